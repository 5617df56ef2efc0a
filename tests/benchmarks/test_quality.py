"""The comparison of methods at equal budget: every row of its plan trains, and what it says of it."""

import pytest
import torch

from benchmarks.harness import record, validate
from benchmarks.quality import __main__ as command
from benchmarks.quality import report, training
from benchmarks.quality.plan import TABLES, plan


def rows():
    """One run of each row of each table."""
    return {
        (table, run.name): run
        for table in TABLES
        for run in plan(table)
        if (run.seed, run.settings["epochs"]) == (0, 10)
    }


@pytest.mark.parametrize(
    "row", [pytest.param(r, marks=[] if r[0] == "main" else pytest.mark.slow) for r in rows()]
)
def test_every_row_trains_and_is_evaluated(row, monkeypatch):
    run = rows()[row]
    monkeypatch.setattr(training, "BATCH_SIZE", 16)
    settings = {**run.settings, "epochs": 1, "per_class": 3, "split": "test"}
    figures = training.train(settings, 0, None, "cpu")
    validate(record(run, figures), run.name)
    assert 0 <= figures["linear"] <= 100
    assert [point["epoch"] for point in figures["curve"]] == [1]
    met = {term.rpartition("/")[2] for term in figures["terms"] if "/" in term}
    assert met == set(settings["representations"])


def test_plans_name_each_run_once_and_choose_on_held_out_images():
    for table in TABLES:
        runs = list(plan(table))
        assert len({run.name for run in runs}) == len(runs)
        assert {run.settings["split"] for run in runs} == {
            "test" if table == "main" else "validation"
        }


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


def test_differences_are_from_the_methods_own_row():
    def run(linear, seed):
        figures = {"linear": linear, "knn": 1.0, "rank_of_features": 2.0}
        return {"seed": seed, "figures": {**figures, "cpu_seconds_per_epoch": 3.0}}

    rows = {"byol": [run(40.0, 0), run(41.0, 1)], "byol and features": [run(45.0, 1)]}
    assert "| +4.0 |" in report.accuracy_table(rows, None).splitlines()[-1]
    assert "| -4.0 |" in report.accuracy_table(rows, "byol and features").splitlines()[-2]


def test_the_command_runs_what_is_missing(tmp_path, monkeypatch):
    """As the page has it; what a run is, is tried above."""
    asked = []

    def train(settings, seed, data, device):
        asked.append((seed, data.name))
        return {"linear": 50.0}

    monkeypatch.setattr(command, "train", train)
    line = "benchmarks.quality --data FOLDER --plan main --device cpu --limit 2 --results"
    monkeypatch.setattr("sys.argv", [*line.split(), str(tmp_path)])
    for total in (2, 4):
        command.main()
        assert len(asked) == len(list(tmp_path.rglob("*.json"))) == total
    assert {name for _, name in asked} == {"FOLDER"}


def test_the_page_says_what_is_not_run(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in TABLES))
    report.main(tmp_path / "results", page)
    assert page.read_text().count("Not run yet.") == len(TABLES)

"""The report's figures, whatever the number of series, and its words."""

import json

import pytest
from matplotlib.colors import to_hex

from benchmarks.stl10 import __main__ as command
from benchmarks.stl10 import report, train

PRETRAINING = {
    "step_seconds": 1.0,
    "images_per_second": 1.0,
    "peak_memory_mb": 1.0,
    "epochs": 0.5,
    "images": 8,
    "seconds": 1.0,
}


def row(epoch, terms=()):
    losses = {f"loss_{i}": 1.0 + i for i in terms}
    common = {"learning_rate": 0.1, "images_per_second": 10.0, "train_knn_top1": 50.0}
    return {"epoch": epoch, "loss": 3.0, **losses, **common}


def results(label):
    accuracy = {"knn": {"top1": 50.0, "top5": 90.0}}
    settings = {"method": label, "epochs": 2}
    return {
        "label": label,
        "accuracy": accuracy,
        "pretraining": PRETRAINING,
        "settings": settings,
    }


def different(lines):
    colors = [to_hex(line.get_color()) for line in lines]
    return len(set(colors)) == len(colors)


@pytest.mark.parametrize("terms", [1, 7, 8, 9, 20])
def test_each_loss_term_has_its_own_color(terms):
    figure = report._curves([row(1, range(terms)), row(2, range(terms))], "run")
    lines = figure.axes[0].lines
    assert len(lines) == terms + (terms > 1)
    assert different(lines)


@pytest.mark.parametrize("count", [2, 9, 20])
def test_each_run_has_its_own_color(count):
    runs = {f"run {i}": (results("simclr"), [row(1), row(2)]) for i in range(count)}
    lines = report._comparison(runs, ["weighted kNN"]).axes[1].lines
    assert len(lines) == count
    assert different(lines)


def test_a_run_is_not_named_twice(tmp_path, capsys):
    folders = [tmp_path / name for name in ("simclr", "longer")]
    for folder in folders:
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results("simclr")))
        train.write_metrics(folder / train.METRICS, [row(1)])
    command.main(["compare", *map(str, folders), "--output", str(tmp_path / "comparison")])
    table = capsys.readouterr().out
    assert "| simclr |" in table
    assert "| simclr (longer) |" in table
    assert "simclr (simclr)" not in table

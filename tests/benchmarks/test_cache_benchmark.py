from __future__ import annotations

import json

import pytest
import torch

from benchmarks.cache import __main__ as command
from benchmarks.cache import accuracy, figures, steps
from benchmarks.cache.report import write_report
from benchmarks.common.encoder import SmallResNet
from benchmarks.harness import load


@pytest.fixture
def data(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(40) % 2
    monkeypatch.setattr(accuracy, "BATCH_SIZE", 32)
    return images, labels, images[:20], labels[:20]


def test_stored_and_live_training_differ_by_rounding_only(data, monkeypatch):
    # Wider than every representation: nothing is sketched.
    monkeypatch.setitem(accuracy.CONFIGURATIONS, "stored, exact", 1 << 20)
    live, stored, none = (
        accuracy.train(name, data, seed=3, epochs=1)
        for name in ("live, exact", "stored, exact", "none")
    )
    assert set(live["terms"]) == set(steps.CACHEABLE)
    assert live["terms"] == pytest.approx(stored["terms"], abs=1e-3)
    assert none["terms"] == {}
    assert 0 <= none["accuracy"]["linear"]["top1"] <= 100


def test_store_figures(tmp_path):
    figures_ = figures.store_figures(32, 12, tmp_path, batch_size=5)
    # Four sketches of 1024 numbers of two bytes, and an entry of the index.
    assert figures_["bytes_per_100k"] == pytest.approx(100_000 * (4 * 1024 * 2 + 8))
    assert min(figures_.values()) > 0


def test_difference_of_the_loss_is_the_sketch_and_rounding(tmp_path):
    values = figures.value_figures(32, 24, tmp_path)
    loss = values["loss"]
    assert abs(loss["exact, stored"] - loss["exact"]) < 1e-3
    assert abs(loss["sketched, stored"] - loss["sketched"]) < 1e-3
    assert abs(loss["sketched"] - loss["exact"]) < 0.1
    for name, errors in values["distances"].items():
        assert errors["256"] > errors["1024"] > errors["4096"] >= 0
        assert errors["256"] < 1.5 * (2 * 256) ** -0.5
        assert values["dcor"][name]["4096"] <= values["dcor"][name]["256"]


def test_one_command(tmp_path, data, monkeypatch):
    small = {
        "tiny": lambda: (
            torch.nn.Sequential(SmallResNet((8, 16)), torch.nn.Linear(16, 8)),
            32,
        )
    }
    monkeypatch.setattr(steps, "networks", lambda: small)
    monkeypatch.setattr(accuracy, "load", lambda folder: data)
    arguments = ["--repeats", "1", "--count", "16", "--batch-size", "8", "--epochs", "1"]
    arguments += ["--output", str(tmp_path), "--threads", "1", "--seeds", "0"]
    names = ["none", "live, exact"]
    command.main([*arguments, "--configurations", *names])
    page = (tmp_path / "RESULTS.md").read_text()
    for words in ("tiny | four from the store", "32 x 32 | 820", "exact, stored", "| none | 0 |"):
        assert words in page
    assert (tmp_path / "cache.png").stat().st_size > 0
    results = load(tmp_path / "results")
    assert [record["name"] for record in results] == [
        *("accuracy/live-exact-seed0", "accuracy/none-seed0", "steps", "store", "values")
    ]
    assert str(tmp_path) not in json.dumps(results)

    # A run that is there is kept, and a part is measured beside the others.
    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(accuracy, "train", fail)
    command.main([*arguments, "--configurations", *names, "--only", "accuracy"])
    assert (tmp_path / "RESULTS.md").read_text() == page
    with pytest.raises(SystemExit, match="made with other settings"):
        command.main([*arguments, "--only", "accuracy", "--epochs", "2"])


def test_report_of_nothing(tmp_path):
    write_report(tmp_path)
    assert not any(tmp_path.iterdir())

"""The lightly example, on a part of the photographs and on a folder."""

import pytest
import torch

from benchmarks.common.encoder import SmallResNet
from benchmarks.common.photographs import Photographs
from examples import lightly_mvmr


@pytest.fixture
def few(monkeypatch):
    """Few crops of each photograph, so that the example takes seconds."""
    monkeypatch.setattr(
        lightly_mvmr,
        "Photographs",
        lambda split: Photographs(split, crops_per_class=48 if split == "train" else 12),
    )


def test_trains_and_saves(few, tmp_path, capsys):
    arguments = ["--epochs", "4", "--batch-size", "48", "--accelerator", "cpu"]
    accuracy = lightly_mvmr.main([*arguments, "--output", str(tmp_path)])
    # Measured: see the assertion's margin; chance is 9.1.
    assert accuracy["trained"] > accuracy["untrained"]
    assert f"trained {accuracy['trained']:.1f}" in capsys.readouterr().out
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    SmallResNet().load_state_dict(state)


def test_folder(tmp_path):
    for split, count in (("train", 24), ("test", 4)):
        photographs = Photographs(split, crops_per_class=count)
        for i in range(3 * count):
            image, label = photographs[i]
            (tmp_path / split / str(label)).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / split / str(label) / f"{i}.png")
    folders = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    options = ["--epochs", "1", "--batch-size", "36", "--accelerator", "cpu"]
    accuracy = lightly_mvmr.main([*folders, *options, "--output", str(tmp_path / "out")])
    assert set(accuracy) == {"untrained", "trained"}
    assert all(0 <= value <= 100 for value in accuracy.values())


def test_exception(tmp_path, capsys):
    with pytest.raises(SystemExit):
        lightly_mvmr.main(["--train", str(tmp_path)])
    assert "--train and --test must be given together" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="must be a folder with one folder of images"):
        lightly_mvmr.main(["--train", str(tmp_path / "a"), "--test", str(tmp_path / "b")])

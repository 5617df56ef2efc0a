from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mvmr_loss.teachers import load_checkpoint
from tests.teachers.networks import Own

# Checkpoint files.


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "teacher", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.encoder."])
def test_checkpoint_wherever_the_weights_are(tmp_path, key, prefix):
    saved, loaded = Own(), Own()
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    state["another.weight"] = torch.zeros(1)
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "c.pt")
    load_checkpoint(loaded, tmp_path / "c.pt")
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_checkpoint_with_the_weights_twice(tmp_path):
    saved = {"student.": Own(), "target.": Own()}
    state = {p + n: v for p, network in saved.items() for n, v in network.state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    loaded = Own()
    with pytest.raises(
        ValueError, match="several times, so prefix must be given: one of student., target."
    ):
        load_checkpoint(loaded, tmp_path / "c.pt")
    load_checkpoint(loaded, tmp_path / "c.pt", prefix="target.")
    assert torch.equal(loaded.head.weight, saved["target."].head.weight)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_checkpoint_without_counts_of_batches(tmp_path, prefix):
    saved, loaded = Own(), Own()
    loaded.stem[1].num_batches_tracked.fill_(5)
    saved.stem[1].running_mean.fill_(0.5)
    state = {f"{prefix}{n}": v for n, v in saved.state_dict().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "c.pt")
    load_checkpoint(loaded, tmp_path / "c.pt")
    assert torch.equal(loaded.stem[1].running_mean, saved.stem[1].running_mean)
    assert loaded.stem[1].num_batches_tracked == 5
    del state[f"{prefix}stem.1.running_mean"]
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="lacks .*stem.1.running_mean|lacks stem.0.weight"):
        load_checkpoint(loaded, tmp_path / "c.pt")


def test_checkpoint_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved, loaded = Own(), Own()
    torch.save(saved.state_dict(), tmp_path / "c.pt")
    for path in ("~/c.pt", Path("~/c.pt")):
        loaded.head.weight.data.zero_()
        load_checkpoint(loaded, path)
        assert torch.equal(loaded.head.weight, saved.head.weight)


def test_safetensors(tmp_path):
    torch_file = pytest.importorskip("safetensors.torch")
    saved, loaded = Own(), Own()
    torch_file.save_file(saved.state_dict(), tmp_path / "c.safetensors")
    load_checkpoint(loaded, tmp_path / "c.safetensors")
    assert torch.equal(loaded.head.weight, saved.head.weight)
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_checkpoint(loaded, tmp_path / "c.safetensors")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "flipped"])
def test_damaged_checkpoint(tmp_path, damage):
    torch.save(Own().state_dict(), tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    content = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"<html>not found</html>"}
    content["flipped"] = whole[:100] + bytes(255 - byte for byte in whole[100:300]) + whole[300:]
    (tmp_path / "c.pt").write_bytes(content[damage])
    with pytest.raises(ValueError, match="cannot be read as a file of tensors: it is damaged, or"):
        load_checkpoint(Own(), tmp_path / "c.pt")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_objects_are_not_unpickled(tmp_path, save):
    mark = tmp_path / "executed"
    save({"state_dict": Own().state_dict(), "evil": Evil(mark)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds objects that would run code when loaded"):
        load_checkpoint(Own(), tmp_path / "c.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state dict but holds a list"),
        ({"epoch": 3}, "must hold a state dict but holds a dict"),
        (
            {"head.bias": torch.zeros(5)},
            r"must have all weights of the network but lacks stem.0.weight, ",
        ),
        (
            {**Own().state_dict(), "head.weight": torch.zeros(7, 6)},
            r"head.weight has \(7, 6\) there, \(5, 6\) in the network; check the model",
        ),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pt")
    network = Own()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message):
        load_checkpoint(network, tmp_path / "c.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

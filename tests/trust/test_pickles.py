"""No pickle is ever loaded: one that would run code is refused wherever a file of weights is read."""

from __future__ import annotations

import ast
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mvmr_loss.teachers import load_checkpoint
from tests.cache.helpers import ROOT


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (Path.write_text, (Path(self.trace), "run"))


def as_pickle(path, evil):
    path.write_bytes(pickle.dumps({"state_dict": evil}))


def as_checkpoint(path, evil):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "callbacks": evil}, path)


def as_old_checkpoint(path, evil):
    content = {"state_dict": {"weight": torch.zeros(1)}, "callbacks": evil}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_zip(path, evil):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(evil))
        file.writestr("archive/version", "3\n")


FORMS = [as_pickle, as_checkpoint, as_old_checkpoint, as_zip]


def read_teacher(path):
    load_checkpoint(nn.Linear(2, 1), path)


def read_timm(path):
    from mvmr_loss import Teacher

    Teacher(source="timm", model="resnet10t", weights=str(path))


def read_torchvision(path):
    from mvmr_loss import Teacher

    Teacher(source="torchvision", model="squeezenet1_1", weights=str(path))


def run_folder(path):
    """A folder of a run of the STL10 benchmark, with this file for its checkpoint."""
    from benchmarks.stl10.settings import PRESETS
    from benchmarks.stl10.train import CHECKPOINT, SETTINGS

    settings = yaml.safe_load((PRESETS / "quick.yaml").read_text())
    (path.parent / SETTINGS).write_text(yaml.safe_dump({**settings, "data": "stl10"}))
    path.rename(path.parent / CHECKPOINT)
    return path.parent


def read_run(path):
    from benchmarks.stl10.train import load_run

    load_run(run_folder(path))


def read_encoder(path):
    from benchmarks.plain_pytorch.training import load_encoder

    load_encoder(path)


READERS = [read_teacher, read_timm, read_torchvision, read_run, read_encoder]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".tar", ".safetensors"])
@pytest.mark.parametrize("form", FORMS)
def test_teacher_checkpoints(form, suffix, tmp_path):
    path, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(ValueError, match="cannot be read as"):
        read_teacher(path)
    assert not trace.exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_reader(form, reader, tmp_path):
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(ValueError, match="would run code when loaded"):
        reader(path)
    assert not trace.exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_malicious_file_would_run(form, tmp_path):
    """Or the tests above would pass for nothing."""
    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    content = path.read_bytes()
    if form is as_pickle:
        pickle.loads(content)
    elif form is as_zip:
        pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    else:
        torch.load(path, weights_only=False)
    assert trace.read_text() == "run"


@pytest.mark.parametrize("form", [as_checkpoint, as_pickle])
def test_transfer(form, stl10_files, tmp_path):
    from benchmarks.stl10.__main__ import main

    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    with pytest.raises(SystemExit, match="would run code when loaded"):
        main(
            ["transfer", str(path), "classes", "--backbone=small", f"--data_dir={stl10_files.root}"]
        )
    assert not trace.exists()


@pytest.mark.parametrize(("version", "warned"), [("2.9.1+cu128", True), ("2.10.0", False)])
def test_a_torch_that_reads_crafted_files_unsafely_is_told(
    version, warned, tmp_path, caplog, monkeypatch
):
    torch.save({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "__version__", version)
    for _ in range(2):
        read_teacher(tmp_path / "weights.pt")
    told = [record for record in caplog.records if "CVE-2026-24747" in record.getMessage()]
    assert len(told) == warned


@pytest.mark.parametrize("form", [as_checkpoint, as_pickle])
def test_resume(form, stl10_files, tmp_path):
    """The checkpoint is looked at before Lightning gets it."""
    from benchmarks.stl10.__main__ import main
    from benchmarks.stl10.train import SETTINGS

    path, trace = tmp_path / "weights.pt", tmp_path / "trace"
    form(path, Malicious(trace))
    folder = run_folder(path)
    content = yaml.safe_load((folder / SETTINGS).read_text())
    content |= {"data_dir": str(stl10_files.root), "batch_size": 40, "accelerator": "cpu"}
    (folder / SETTINGS).write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match="would run code when loaded"):
        main(["run", "--resume", str(folder)])
    assert not trace.exists()


def test_nothing_unpickles_by_its_source():
    """Each call that could, in each file of the project, says that it must not."""
    faults, calls = [], 0
    parts = ("mvmr_loss", "adapters", "benchmarks", "examples")
    files = [path for part in parts for path in (ROOT / part).rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            allowed = {
                "torch.load": options.get("weights_only") == "True",
                "np.load": options.get("allow_pickle", "False") == "False",
                "yaml.load": [ast.unparse(a) for a in node.args[1:]] == ["_PlainLoader"],
                **dict.fromkeys(("pickle.load", "pickle.loads", "yaml.unsafe_load"), False),
                **dict.fromkeys(("joblib.load", "yaml.full_load", "torch.jit.load"), False),
            }
            calls += name in allowed
            if not allowed.get(name, True):
                faults.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not faults
    assert calls >= 2


def damaged(data, number):
    """A damaged copy of a file: cut, or with bytes of another kind, drawn by its number."""
    generator = torch.Generator().manual_seed(number)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    data = bytearray(data)
    if number % 3 == 0:
        del data[draw(len(data)) :]
    for _ in range(1 + draw(6) if number % 3 else 0):
        data[draw(len(data))] = draw(256)
    return bytes(data)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".old.pt"])
def test_damaged_checkpoints(suffix, tmp_path):
    """Each is an error of one kind that names the file, or the right weights."""
    from safetensors.torch import save_file

    network = nn.Linear(4, 3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pt")
    whole, counts = path.read_bytes(), {"refused": 0, "right": 0, "other": 0}
    for number in range(150):
        path.write_bytes(damaged(whole, number))
        loaded = nn.Linear(4, 3)
        try:
            load_checkpoint(loaded, path)
            same = torch.equal(loaded.weight, network.weight) and torch.equal(
                loaded.bias, network.bias
            )
            counts["right" if same else "other"] += 1
        except ValueError as error:
            assert "weights" in str(error)  # noqa: PT017
            counts["refused"] += 1
    assert counts["refused"] > 50
    # The other two formats have no checksums: damage that leaves them readable is not seen.
    assert (counts["other"] == 0) == (suffix == ".pt"), counts


@pytest.mark.parametrize(
    "content",
    [
        *(None, 5, "text", [], {}, [torch.zeros(2)], {"state_dict": 3}, {"weight": [1.0, 2.0]}),
        *({1: torch.zeros(2)}, {"weight": torch.zeros(1, 2)}, {"state_dict": {}}),
        {"weight": torch.zeros(2, 1), "bias": torch.zeros(1)},
    ],
    ids=repr,
)
def test_checkpoints_of_wrong_contents(content, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pt must (hold|have)"):
        read_teacher(path)


@pytest.mark.parametrize("length", [2**62, 10, 0])
def test_safetensors_with_a_false_header(length, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_teacher(path)

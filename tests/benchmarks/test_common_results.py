import json
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.common import results
from benchmarks.common.results import atomic_path, command, environment, portable, write_json


def test_environment_names_machine_versions_and_seed():
    record = environment(seed=7)
    assert record["seed"] == 7
    assert record["machine"]["cpu"]
    assert record["machine"]["cores"] >= 1
    assert {"mvmr_loss", "torch", "kornia"} <= set(record["versions"])
    assert json.loads(json.dumps(record)) == record


def test_command_has_no_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "runs" / "one"), "/data/secret/images/train"
    program = str(tmp_path / "program.py")
    monkeypatch.setattr(results.sys, "argv", [program, "--output", inside, f"--train={outside}"])
    monkeypatch.setattr(results.sys.modules["__main__"], "__spec__", None)
    assert command() == "python program.py --output runs/one --train=.../images/train"


@pytest.mark.parametrize("value", [1, 0.5, None, "hog", ["hog"], "runs/one", "-1"])
def test_portable_leaves_the_rest(value):
    assert portable(value) == value


def test_portable_home():
    assert portable(Path("~/data/cifar10/train")) == ".../cifar10/train"


def test_write_json_is_atomic(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with suppress(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]

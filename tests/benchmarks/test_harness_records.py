import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import mvmr_loss
from benchmarks.harness import Run, record, records
from benchmarks.harness.records import atomic_path, code, command, environment, portable, write_json


def test_environment_names_machine_and_versions():
    record = environment()
    assert record["machine"]["cpu"]
    assert record["machine"]["cores"] >= 1
    assert {"mvmr_loss", "torch", "kornia"} <= set(record["versions"])
    assert json.loads(json.dumps(record)) == record


def test_code_names_the_commit_and_the_package(tmp_path, monkeypatch):
    here = code()
    assert here["package"] == "checkout"
    assert here["commit"] is None or len(here["commit"]) == 10
    package = tmp_path / "site" / "mvmr_loss"
    shutil.copytree(Path(mvmr_loss.__file__).parent, package)
    # As in a wheel, the adapters lie inside; they are not counted.
    (package / "adapters").mkdir()
    (package / "adapters" / "__init__.py").write_text("")
    (tmp_path / "site" / "mvmr_loss-9.dist-info").mkdir()
    monkeypatch.setattr(mvmr_loss, "__file__", str(package / "__init__.py"))
    assert code() == {**here, "package": "wheel"}
    (package / "loss.py").write_text("x = 1")
    assert code()["sources"] != here["sources"]


def test_command_has_no_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "runs" / "one"), "/data/secret/images/train"
    program = str(tmp_path / "program.py")
    monkeypatch.setattr(records.sys, "argv", [program, "--output", inside, f"--train={outside}"])
    monkeypatch.setattr(records.sys.modules["__main__"], "__spec__", None)
    assert command() == "python program.py --output runs/one --train=.../images/train"


@pytest.mark.parametrize(
    ("given", "shortened"),
    [
        ("[{name: teacher, model: 'm:f', weights: /data/nets/w.pt}]", ".../nets/w.pt}]"),
        ("--representations=[{weights: '/data/my nets/a/w.pt'}]", "a/w.pt'}]"),
        ('{"weights":"/data/nets/w.pt"}', '":".../nets/w.pt"}'),
        ("[/data/a/one,/data/a/two]", "[.../a/one,.../a/two]"),
        ("{weights: ~/nets/a/w.pt}", "{weights: .../a/w.pt}"),
        ("local-dir:/data/nets/clip", "local-dir:.../nets/clip"),
        ("file://" + "/data/nets/w.pt", "file://.../nets/w.pt"),
        ("/data/nets/w.pt:/data/nets/x.pt", ".../nets/x.pt"),
        ("--config=/data/lr=0.1/a.yaml", "--config=.../lr=0.1/a.yaml"),
        ("a=/data/nets=/data/w.pt", "a=.../data/nets=.../data/w.pt"),
        ("/tmp", ".../tmp"),
        ("one /a/b, /c", "one .../a/b, .../c"),
    ],
)
def test_a_path_is_shortened_wherever_it_stands(given, shortened, monkeypatch):
    """And what comes of it may stand in a record."""
    assert portable(given).endswith(shortened)
    monkeypatch.setattr(records.sys, "argv", ["x", given])
    record(Run("one", {"given": given}), {"value": given})


@pytest.mark.parametrize(
    "value",
    [
        *(1, 0.5, None, "hog", ["hog"], {"a": 1}, "runs/one", "-1", "~0.5", "images/s", "a / b"),
        *("https://example.org/a/b", "[{name: t, weights: nets/w.pt, model: m:f}]", "../a/b"),
    ],
)
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

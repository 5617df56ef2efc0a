"""The one command for a GPU, in miniature on a CPU: a lease is not spent on its errors."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts
from benchmarks.gpu.report import write_report
from benchmarks.harness import load
from benchmarks.stl10 import methods
from mvmr_loss import MVMRLoss

CPU = torch.device("cpu")


AUTOCAST = []


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """The arguments of a miniature; nothing is compiled, nor in bfloat16, which is slow on a CPU."""

    def autocast(*_, enabled=True):
        AUTOCAST.append(enabled)
        return nullcontext()

    AUTOCAST.clear()
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(methods, "SMALL_WIDTHS", (8, 16))
    return ["--device", "cpu", "--miniature", "--output", str(tmp_path)]


def test_one_command_leaves_every_part_and_goes_on_where_it_stopped(tried, tmp_path, monkeypatch):
    command.main([*tried, "--minutes", "0"])
    assert load(tmp_path) == []
    command.main([*tried, "--only", "speed", "launches", "step"])
    assert True in AUTOCAST
    with monkeypatch.context() as patch:
        patch.setitem(parts.PARTS, "step", lambda *_: pytest.fail("measured again"))
        command.main(tried)
    names = {record["name"] for record in load(tmp_path)}
    assert names == {
        *("cpu/limits-run0", "launches", "representations-32", "quick-preset"),
        *("resnet18-32-eager", "resnet18-32-bf16-compiled"),
    }
    found = {record["name"]: record["figures"] for record in load(tmp_path)}
    assert set(found["resnet18-32-eager"]["times"]) == {
        *("network alone", "no representations", "five, live", "five, live, sketched")
    }
    waited, computed = (found["quick-preset"][k] for k in ("seconds", "seconds_computing"))
    assert sum(waited) >= sum(computed) > 0
    assert len(found["quick-preset"]["seconds"]) == 2
    assert set(found["representations-32"]["times"]["scattering"]) == {"mvmr-loss", "kymatio 0.3.0"}
    assert found["representations-32"]["error"] < 1e-5

    command.main(["--report", "--output", str(tmp_path)])
    page = (tmp_path / "gpu" / "RESULTS.md").read_text()
    for words in (
        "resnet18, 32 px, 4 images, bf16, compiled | five, live | ",
        "| 4 images of 32 px | kymatio 0.3.0 |",
        "| loss, five sketches | ",
        "The pretraining of the quick preset on STL10: ",
    ):
        assert words in page
    assert "GFLOP/s in a matrix product" in (tmp_path / "speed" / "RESULTS.md").read_text()


def test_a_part_that_fails_does_not_cost_the_others(tried, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory")

    for name in parts.PARTS:
        monkeypatch.setitem(parts.PARTS, name, lambda *_: {"value": 1})
    monkeypatch.setitem(parts.PARTS, "launches", fail)
    with pytest.raises(SystemExit, match="1 runs failed, 1 are left"):
        command.main([*tried, "--only", *parts.PARTS])
    assert "launches failed: RuntimeError: out of memory" in capsys.readouterr().err
    assert len(load(tmp_path)) == 4


def test_the_full_plan_has_the_papers_sizes():
    planned = list(command.plan(command.FULL, "cuda"))
    runs = [p.run for p in planned]
    assert len({(p.folder, p.run.name) for p in planned}) == len(planned)
    sides = {
        (r.settings["side"], r.settings["mode"]) for r in runs if r.name.startswith("resnet50")
    }
    assert sides == {(side, mode) for side in (96, 224) for mode in command.FULL.modes}
    assert {r.settings["part"] for r in runs if r.name.startswith("cuda/")} == set(
        command.speed.PARTS
    )


def test_launches_are_counted():
    z = torch.randn(8, 4, requires_grad=True)
    forward = parts.count_launches(lambda: MVMRLoss()(z, z + 1), CPU)
    both = parts.count_launches(lambda: MVMRLoss()(z, z + 1).backward(), CPU)
    assert 0 < forward < both


def test_without_results_the_page_says_so(tmp_path):
    write_report(tmp_path)
    assert "There are no figures" in (tmp_path / "RESULTS.md").read_text()


def test_exception(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--miniature", "--device", "cpu"])
    assert "--miniature needs an --output" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main(["--output", str(tmp_path)])
        assert "--device cuda needs a GPU" in capsys.readouterr().err

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness.records import environment
from benchmarks.harness.timing import interleaved, medians
from benchmarks.speed import __main__ as command
from benchmarks.speed import growth, losses, modes, representations, training_step
from benchmarks.speed.release import release_loss
from benchmarks.speed.report import record, rows, write_report
from mvmr_loss import MVMRLoss, Representations
from mvmr_loss.dependence import dependence_measure
from mvmr_loss.representations import DCT, HOG, LocalStd

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SCATTERING = {"seconds": {"mvmr-loss": 1.0, "kymatio 0.3.0": 9.0}, "error": 1e-7}
MEMORY = {"release": 8.0, "exact": 2.0, "exact, n = 4096": 10.0, "blocks, n = 4096": 1.0}
RELEASE = {"release": 1.0, "exact": 0.3, "sketched on the fly": 0.2, "ready sketches": 0.1}


@pytest.fixture
def small(monkeypatch):
    """Sizes at which every measurement takes a moment; what is measured stays."""
    embeddings, features, photographs = (
        losses.embeddings,
        losses.features,
        representations.photographs,
    )

    def few(n, device, sizes=losses.SIZES):
        return features(min(n, 12), device, dict.fromkeys(sizes, 40))

    for module in (losses, modes, growth):
        monkeypatch.setattr(
            module, "embeddings", lambda n, d, device: embeddings(min(n, 12), 16, device)
        )
        monkeypatch.setattr(module, "features", few)
    for module in (representations, modes, growth, training_step):
        monkeypatch.setattr(
            module, "photographs", lambda n, size, device: photographs(3, 32, device)
        )
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    questions = {
        "batch size n (a note)": (4, 8, 12),
        "number of representations K (a note)": (0, 2),
        "image size (HOG, local std and DCT of 8 images)": (32, 48, 64),
    }
    monkeypatch.setattr(growth, "QUESTIONS", questions)


def results(**parts):
    return {name: {**environment(), "result": result} for name, result in parts.items()}


def test_release_is_the_formulation_in_method_md():
    z, v = (x.double() for x in losses.embeddings(20, 30, CPU))
    ys = {name: y.double() for name, y in losses.features(20, CPU, {"a": 50, "b": 7}).items()}
    measure = dependence_measure("distance_correlation", eps=1e-4)
    torch.testing.assert_close(
        release_loss(z, v, ys), MVMRLoss(dependence_measure=measure)(z, v, ys)
    )


def test_peers_compute_the_same_as_ours():
    images = representations.photographs(2, 32, CPU)
    torch.testing.assert_close(
        representations.torch_dct(representations.torch_dct(images).mT).mT.flatten(1),
        DCT()(images).flatten(1),
        rtol=1e-4,
        atol=1e-4,
    )
    inner = (..., slice(1, -1), slice(1, -1))  # The borders may be padded in another way.
    torch.testing.assert_close(
        representations.torch_local_std(images)[inner],
        LocalStd()(images).reshape(images.shape)[inner],
        rtol=1e-3,
        atol=1e-3,
    )
    ours, theirs = HOG()(images).flatten(), representations.torch_hog(images).flatten()
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.9


def test_scattering_equals_kymatio():
    assert representations.scattering(32, CPU, repeats=1)["error"] < 1e-5


def test_medians_take_turns():
    ran = []
    times = medians(
        interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, CPU, repeats=3)
    )
    assert "".join(ran) == "baabbaabba"
    assert set(times) == {"a", "b"}
    assert min(times.values()) > 0


PEAK = """
import torch
from benchmarks.harness.timing import peak_memory
print(peak_memory(lambda: torch.ones(16 << 20), torch.device("cpu")))  # 64 MiB, gone afterwards
"""


def test_peak_memory_counts_what_is_freed_again():
    # In a process of its own: what earlier tests have freed would be used again.
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert 60 << 20 < float(done.stdout) < 120 << 20


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.losses", "exact", "cpu"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) > 1 << 20


def test_growth_fits_an_exponent(small):
    sizes = [2.0**k for k in range(8)]
    assert growth._exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(
        1.7, rel=1e-4
    )
    found = growth.growth(CPU, repeats=1)
    assert "exponent" in found["batch size n (a note)"]
    assert "exponent" not in found["number of representations K (a note)"]


def test_goals_are_met_or_not():
    table = rows(results(release=RELEASE, memory=MEMORY))
    assert [(row.what.partition(", ")[2], row.ratio, row.goal) for row in table[:2]] == [
        ("exact", 0.3, pytest.approx(1 / 3)),
        ("sketched on the fly", 0.2, 0.125),
    ]
    assert table[-2].ratio == 0.25


def test_history_shows_a_regression(tmp_path):
    (tmp_path / "results").mkdir()
    for exact in (0.3, 0.9):
        content = results(release={**RELEASE, "exact": exact}, memory=MEMORY)
        (tmp_path / "results" / "cpu.json").write_text(json.dumps(content))
        record(tmp_path, "cpu", content, ["release"])
    history = (tmp_path / "results" / "history.jsonl").read_text().splitlines()
    assert len(history) == 2
    # What was not measured again is not repeated.
    assert not any("memory" in name for name in json.loads(history[1])["ratios"])
    write_report(tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| loss at d = 8192, exact | release's formulation | 0.9 | <= 0.333 | no | 0.3 |" in page
    assert "There are no figures for cuda" in page


def test_one_command(tmp_path, small, monkeypatch):
    monkeypatch.setattr(losses, "memory", lambda device: MEMORY)
    monkeypatch.setattr(representations, "scattering", lambda *_: SCATTERING)
    command.main(["--repeats", "1", "--threads", "1", "--output", str(tmp_path)])
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"results", "RESULTS.md", "growth_cpu.png", "ratios_cpu.png"}
    found = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert str(tmp_path) not in json.dumps(found)
    page = (tmp_path / "RESULTS.md").read_text()
    for row in rows(found):
        assert f"| {row.what} | {row.against} |" in page
    kernels = "with" if command.has_kernels() else "without"
    assert f", {kernels} its C++ kernels." in page
    assert {row.part for row in rows(found)} == set(found) - {"growth"}
    # A part alone leaves the others as they were.
    command.main(["--only", "memory", "--output", str(tmp_path), "--threads", "1"])
    again = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert {name: again[name] for name in again if name != "memory"} == {
        name: found[name] for name in found if name != "memory"
    }


def test_exception_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "--device cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_representations_compile_without_graph_breaks():
    images = representations.photographs(2, 32, CPU)
    for name in modes.NAMES:
        module = Representations([name])
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(
            compiled(images)[name], module(images)[name], rtol=1e-4, atol=1e-4
        )

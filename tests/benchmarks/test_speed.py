from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Run, load, record, write_json
from benchmarks.harness.runs import read
from benchmarks.speed import __main__ as command
from benchmarks.speed import counts, growth, limits, losses, modes, representations, training_step
from benchmarks.speed.release import release_loss
from benchmarks.speed.table import GOALS, regressions, rows, write_report
from mvmr_loss import MVMRLoss, Representations
from mvmr_loss.dependence import dependence_measure
from mvmr_loss.representations import DCT, HOG, LocalStd

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SCATTERING = {"times": {"mvmr-loss": [1.0], "kymatio 0.3.0": [9.0]}, "error": 1e-7}
MEMORY = {"release": [8.0], "exact": [2.0], "exact, n = 4096": [10.0], "blocks, n = 4096": [1.0]}
LOSS = {"release": [1.0, 2.0], "exact": [0.3, 0.6], "ready sketches": [0.1, 0.2]}


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


def results(runs=1, **parts):
    """Records of parts, each as often as there are runs; a callable makes one of a run's number."""
    return [
        record(
            Run(f"cpu/{part}-run{run}", {"part": part, "kernels": True}),
            {"times": times(run) if callable(times) else times},
        )
        for run in range(runs)
        for part, times in parts.items()
    ]


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


def test_rows_have_ratios_spreads_and_goals():
    table = rows(results(runs=2, loss={"d = 8192": LOSS}))
    assert [(row.ours, row.ratio, row.spread, row.met) for row in table] == [
        ("exact", 0.3, 0, True),
        ("ready sketches", 0.1, 0, None),
    ]
    assert [row.ratio for row in rows(results(memory={"peak": MEMORY}))] == [0.25, 0.1]


def scattering(slow):
    """Five runs, the last of which may be slower."""
    size = {"mvmr-loss": [1.0], "kymatio 0.3.0": [13.0]}
    group = "32 x 32 x 3, batch 32"
    return results(
        runs=5,
        scattering=lambda run: {group: {**size, "mvmr-loss": [slow if run == 4 else 1.0]}},
    )


def test_a_goal_of_every_run_is_missed_by_one():
    (fast,), (once,) = rows(scattering(1.0)), rows(scattering(1.2))
    assert (fast.met, once.met) == (True, False)
    assert fast.ratio == once.ratio
    assert regressions([fast], []) == []
    assert regressions([once], [])[0].endswith("goal 0.0833")


@pytest.mark.parametrize("now", [0.29, 0.23, 0.1])
def test_a_ratio_within_the_spread_is_no_regression(now):
    def wide(run):
        return {"d = 8192": {"release": [1.0], "exact": [0.2 + 0.1 * run / 2]}}

    recorded = rows(results(runs=3, loss=wide))  # 0.25, give or take 0.05
    measured = rows(results(loss={"d = 8192": {"release": [1.0], "exact": [now]}}))
    assert regressions(measured, recorded) == []


def test_a_ratio_beyond_the_spread_is_a_regression():
    recorded = rows(results(runs=3, loss={"d = 8192": {"release": [1.0], "exact": [0.2]}}))
    measured = rows(results(loss={"d = 8192": {"release": [1.0], "exact": [0.21]}}))
    (sentence,) = regressions(measured, recorded)
    assert "exact / release is 0.21 ± 0, was 0.2 ± 0" in sentence


def test_goals_name_rows_that_exist(tmp_path, small, monkeypatch):
    """A goal whose row is misspelt would never be missed."""
    monkeypatch.setattr(losses, "memory", lambda device: MEMORY)
    monkeypatch.setattr(representations, "scattering", lambda *_: SCATTERING)
    arguments = ["--repeats", "1", "--runs", "1", "--threads", "1", "--output", str(tmp_path)]
    command.main(arguments)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"results", "RESULTS.md", "growth_cpu.png", "ratios_cpu.png"}
    found = load(tmp_path / "results" / "cpu")
    table = rows(found)
    assert set(GOALS) <= {row.key for row in table}
    assert {row.part for row in table} == set(command.PARTS) - {"limits", "growth"}
    page = (tmp_path / "RESULTS.md").read_text()
    assert all(f"{row.group}: {row.ours} | {row.theirs} |" in page for row in table)
    assert "There are no figures for cuda" in page
    assert "from a checkout" in page
    assert all(row.limit > 0 for row in table if row.part != "memory")

    # A second call measures nothing, and a check notes what the first has recorded.
    monkeypatch.setattr(command, "measure", lambda run: pytest.fail("measured again"))
    command.main(arguments)

    def slower(run):
        record_of = next(r for r in found if r["settings"]["part"] == run.settings["part"])
        figures = json.loads(json.dumps(record_of["figures"]))
        figures["times"]["d = 8192"]["exact"] = [1e3]
        return figures

    monkeypatch.setattr(command, "measure", slower)
    with pytest.raises(SystemExit, match="regressions or missed goals"):
        command.main([*arguments, "--check", "--only", "loss"])
    assert load(tmp_path / "results" / "cpu") == found


def test_counts_have_not_grown():
    """Launches, operations, bytes written and kept: the part of the gate that is the same anywhere."""
    found = counts.counts()
    remedy = "if it is meant, record anew: python -m benchmarks.speed --counts"
    assert counts.regressions(found) == [], remedy
    assert read(counts.RESULTS / "counts.json")["figures"].keys() == found.keys()


def test_a_count_that_has_grown_fails_the_check(tmp_path, monkeypatch):
    counts.record_counts(tmp_path / "results")
    figures = read(tmp_path / "results" / "counts.json")["figures"]
    monkeypatch.setattr(counts, "counts", lambda: figures)
    assert command.check(tmp_path, [], "cpu") == []
    figures["hog"]["launches"] += 1
    (sentence,) = command.check(tmp_path, [], "cpu")
    assert sentence.startswith("hog: launches are ")
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert command.check(tmp_path, [], "cpu") == []


def test_of_one_run_the_rounds_tell_the_spread():
    rounds = {"release": [1.0, 1.0, 1.0], "exact": [0.20, 0.25, 0.30]}
    (recorded,) = rows(results(loss={"d = 8192": rounds}))
    assert recorded.spread == pytest.approx(0.025)
    for now, worse in ((0.27, 0), (0.28, 1)):
        slow = {"d = 8192": {"release": [1.0], "exact": [now]}}
        assert len(regressions(rows(results(loss=slow)), [recorded])) == worse


def test_the_column_of_the_limit_is_made_of_measured_rates(tmp_path):
    per_second = {"matrix product": [2 * 2048**3 / 1e9], "copy": [2 * 256 * 2**20 / 1e9]}
    for found in results(limits={"rates": per_second}, loss={"d = 8192": LOSS}):
        write_json(tmp_path / "results" / f"{found['name']}.json", found)
    exact, ready = rows(load(tmp_path / "results"))
    for row in (exact, ready):
        work = limits.least_work("loss", "d = 8192", row.ours)
        assert row.limit == pytest.approx(max(work) / 1e9)
    write_report(tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"| {exact.seconds / exact.limit:.1f} |" in page
    assert "The machine: 1 GFLOP/s in a matrix product, 1 GB/s copying." in page


def test_counts_see_a_launch_and_a_product():
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    one = counts.count(lambda: (x @ x.mT).sum(), backward=False)
    two = counts.count(lambda: (x @ x.mT).exp().sum(), backward=True)
    assert (one["launches"], one["flops"]) == (2, 2 * 4 * 4 * 8)
    assert two["flops"] == 3 * one["flops"]
    assert two["saved"] > one["saved"] > 0
    assert (
        counts.worse({"a": two}, {"a": one})[0] == f"a: launches are {two['launches']} and were 2"
    )
    assert counts.worse({"new": one}, {})


def test_least_work():
    assert limits.step_work(2, 32).flops == pytest.approx(2 * limits.step_work(1, 32).flops)
    rate = limits.per_second({"matrix product": [1.0, 2.0], "copy": [0.5]})
    assert rate == (2 * 2048**3, 4 * 256 * 2**20)
    assert limits.least_work("memory", "peak", "exact") is None
    assert limits.least_work("handcrafted", "dct", "mvmr-loss").flops == 2 * 192 * 2 * 96**3


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

"""The long run in a short form, and whether it would find what grows."""

from __future__ import annotations

import argparse

import pytest

from tests.trust import soak

STEPS = 40


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_forty_steps(processes):
    """So few steps say nothing of memory, but all else is there."""
    settings = argparse.Namespace(steps=STEPS, processes=processes, seed=0)
    figures, faults = soak.attack(settings)
    assert [result["rank"] for result in figures["processes"]] == list(range(processes))
    for result in figures["processes"]:
        assert [seen["step"] for seen in result["looks"]] == list(range(1, STEPS + 1))
        assert result["finite"]
        held = result["last_three_quarters"]
        assert held["handles"]["least"] == held["handles"]["most"] > 2
        assert held["threads"]["most"] >= 1
        assert held["memory_mb"]["least"] > 50
    assert all("memory_mb" in fault or "objects" in fault for fault in faults), faults


def invented(*, finite=True, **growth):
    """What a process saw that gains so much of something over all its steps, after the first quarter."""
    start = {"memory_mb": 700.0, "handles": 12, "threads": 4, "objects": 300_000}
    looks = []
    for step in range(500, 20_001, 500):
        late = max(0, step - 5_000) / 15_000
        seen = {name: held + late * growth.get(name, 0) for name, held in start.items()}
        looks.append({"step": step, **seen})
    # What is gained before is what a process needs.
    looks[0] |= {"memory_mb": 300.0, "handles": 3, "threads": 1, "objects": 100_000}
    return {"rank": 1, "finite": finite, "looks": looks}


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        ({}, None),
        ({"memory_mb": 3.0, "objects": 150}, None),
        ({"memory_mb": -300.0, "handles": -2}, None),
        ({"memory_mb": 12.0}, "process 1: memory_mb grew from"),
        ({"handles": 5}, "process 1: handles grew from"),
        ({"threads": 5}, "process 1: threads grew from"),
        ({"objects": 1_000}, "process 1: objects grew from"),
        ({"finite": False}, "process 1: the loss or a parameter was not finite"),
    ],
    ids=str,
)
def test_judge(growth, said):
    figures, faults = soak.judge(invented(**growth), 20_000)
    assert set(figures) == {"memory_mb", "handles", "threads", "objects"}
    assert len(faults) == (said is not None)
    assert (said or "") in "".join(faults)
    assert figures["memory_mb"]["most"] < 720  # nothing of the first quarter


@pytest.mark.slow
def test_a_process_that_fails_is_a_fault(capfd):
    settings = argparse.Namespace(steps="none", processes=1, seed=0)
    assert soak.attack(settings) == ({}, ["a process ended with an error (see above)"])
    assert "TypeError" in capfd.readouterr().err

"""A benchmark that runs against the wheel says so, and imports nothing from the sources."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import from_wheel

ROOT = Path(__file__).parents[2]


def test_processes_that_a_benchmark_starts_see_the_wheel_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        from_wheel.subprocess,
        "run",
        lambda command, **options: seen.append((command, options)) or SimpleNamespace(returncode=3),
    )
    wheel = tmp_path / "mvmr_loss-9-py3-none-any.whl"
    monkeypatch.setattr(Path, "symlink_to", lambda self, target: None)
    assert from_wheel.run("benchmarks.speed", ["--again"], wheel) == 3
    command, options = seen[-1]
    assert command[1:] == ["-m", "benchmarks.speed", "--again"]
    assert options["env"]["PYTHONSAFEPATH"] == "1"


@pytest.mark.slow
def test_a_benchmark_runs_from_a_wheel(tmp_path):
    arguments = ["--only", "limits", "--runs", "1", "--repeats", "1", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.from_wheel", "benchmarks.speed", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "results" / "cpu" / "limits-run0.json").read_text())
    assert record["code"]["package"] == "wheel"
    assert record["command"].startswith("python -m benchmarks.speed --only limits")
    assert "from a wheel" in (tmp_path / "RESULTS.md").read_text()

"""A benchmark that runs against the wheel says so, and imports nothing from the sources."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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

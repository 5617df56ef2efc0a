"""`make run` installs what the main job needs and no more, and says what it does."""

import json
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands(target, folder):
    """Returns what ``make`` would do for a target in a fresh environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", target, f"VENV={folder / 'venv'}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_run_installs_the_main_jobs_requirements_only(tmp_path):
    output = commands("run", tmp_path)
    assert ".[examples]" in output
    assert ".[dev]" not in output
    assert "-m benchmarks.plain_pytorch" in output
    assert ".[dev]" in commands("test", tmp_path)


@pytest.mark.parametrize("target", ["run", "test"])
def test_pip_is_not_silent(target, tmp_path):
    output = commands(target, tmp_path)
    assert "--quiet" not in output
    assert output.count("pip install") <= 2 * output.count("echo")


def test_an_installed_level_is_not_installed_again(tmp_path):
    for name in (".installed-run", ".installed-dev"):
        (tmp_path / "venv").mkdir(exist_ok=True)
        (tmp_path / "venv" / name).touch()
    assert "pip install" not in commands("run", tmp_path)
    assert "pip install" not in commands("test", tmp_path)


def test_the_main_job_imports_what_run_installs():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.extras_require"]["examples"].split()
    installed = {line.partition(">")[0] for line in lines}
    assert installed == {
        "matplotlib", "pillow", "scikit-image", "scikit-learn", "torchvision", "tqdm",
    }  # fmt: skip
    code = (
        "import sys; import benchmarks.plain_pytorch.training; "
        "print(*{'lightly', 'timm', 'transformers', 'pytorch_lightning'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_run_trains(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed-run").touch()
    options = f"ARGS=--epochs 1 --output {tmp_path / 'results'}"
    command = ["make", "run", f"VENV={tmp_path / 'venv'}", options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert record["figures"]["steps"] == 23
    assert (tmp_path / "results" / "training.png").exists()
    for line in ("training", "features, trained", "top-1 accuracy", "results are in"):
        assert line in done.stdout + done.stderr

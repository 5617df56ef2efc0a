"""Each example is run as a newcomer runs it: as a file, from a folder that is not the checkout."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
# Run where their hosts are tested, in tests/adapters: not every environment can have them.
OF_HOSTS = {"stable_pretraining_mvmr", "timm_dependence", "torchdistill_dependence"}
# What is not on a package index: the checkout's own folders.
NOT_INSTALLED = {"benchmarks", "examples", "adapters", "tests", *(path.stem for path in EXAMPLES)}


def by_name(path):
    return path.stem


def run(path, folder, *options, launcher=()):
    """Runs a file in a folder and returns what it printed."""
    command = [sys.executable, *launcher, str(path), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem not in OF_HOSTS], ids=by_name)
def test_runs_from_anywhere(path, tmp_path):
    output = run(path, tmp_path, "--steps", "2", "--batch-size", "8")
    assert "step    2, loss" in output or "kNN accuracy" in output


@pytest.mark.parametrize("path", EXAMPLES, ids=by_name)
def test_is_short_and_imports_installed_packages_only(path):
    source = path.read_text()
    assert 40 <= len(source.splitlines()) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.partition(".")[0] not in NOT_INSTALLED
        elif isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & NOT_INSTALLED


def test_every_example_is_named_in_a_guide():
    root = EXAMPLES[0].parents[1]
    guides = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("adapters/*/README.md")]
    text = "".join(path.read_text() for path in guides)
    assert EXAMPLES
    for path in EXAMPLES:
        assert path.name in text, path.stem


def test_benchmarks_do_not_import_examples():
    for path in (EXAMPLES[0].parents[1] / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] != "examples", path


def test_without_the_marked_lines_it_is_plain_vicreg(tmp_path):
    lines = EXAMPLES[0].read_text().splitlines(keepends=True)
    plain = [line for line in lines if not line.rstrip().endswith("# MV-MR")]
    assert len(lines) - len(plain) == 9
    path = tmp_path / "plain_vicreg.py"
    path.write_text("".join(plain))
    assert "mvmr_loss" not in path.read_text()
    assert "step    2, loss" in run(path, tmp_path, "--steps", "2", "--batch-size", "8")


def test_several_processes_as_written(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "several_processes")
    command = path.read_text().split("\n\n")[1].split()
    assert command == ["torchrun", "--nproc-per-node", "2", "examples/several_processes.py"]
    # torchrun is this module; on a free port, as other tests run meanwhile.
    launcher = ["-m", "torch.distributed.run", "--standalone", *command[1:-1]]
    output = run(path, tmp_path, "--steps", "12", "--batch-size", "8", launcher=launcher)
    # One process speaks, of the loss that all have.
    assert [line.split(",")[0] for line in output.splitlines()] == ["step   10", "step   12"]
    assert all(0 < float(line.split()[-1]) < 5 for line in output.splitlines())

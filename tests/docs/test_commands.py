"""Every command of the README and the pages is run, by these tests or by one that is named here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"] + [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if not {"_build", "gallery"} & {*path.parts}
]
FIRST_WORDS = ("pip", "python", "make", "pre-commit", "git")
PROGRAM = re.compile(rf"({'|'.join(FIRST_WORDS)}) \S")

# From a fresh checkout, in a fresh environment, one after the other.
INSTALLING = [
    "pip install .",
    "pip install . torchvision",
    "pip install '.[lightly]'",
    "pip install '.[solo]'",
    "pip install '.[distillation]'",
    "pip install '.[examples]'",
    "pip install '.[metrics]'",
    "pip install build",
    "python -m build --wheel",
    "pip install dist/mvmr_loss-*.whl",
    "pre-commit install",
]
# From a folder with images in FOLDER.
CACHING = [
    "python -m mvmr_loss.cache fill STORE --data FOLDER --image-size 96 --representations pixels "
    "scattering hog local_std --sketch-dim 1024",
    "python -m mvmr_loss.cache verify STORE",
    "python -m mvmr_loss.cache info STORE",
]
ELSEWHERE = {
    "python -m benchmarks.import_time --runs 9": "tests/docs/test_commands.py::test_import_time",
    "python tests/cpu/sanitized.py": "tests/cpu/test_sanitized.py::test_no_fault_is_found",
    # In an environment of its own: it clashes with solo-learn.
    "pip install '.[stable-pretraining]'": "noxfile.py::.[stable-pretraining]",
    "make run": "tests/test_makefile.py::test_run_trains",
    "make test": ".ci/run::make test ",
    "make test-slow": ".ci/run::make test-slow",
    "make lint": ".ci/run::make lint",
    "make docs": "tests/docs/test_site.py::test_strict_build",
    "python examples/log_terms.py --logger csv tensorboard wandb": (
        "tests/examples/test_examples.py::test_terms_reach_every_logger"
    ),
}


def commands(page):
    """Returns the commands of a page: lines of indented blocks, and code in the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    lines = [line.strip() for line in re.findall(r"^    .*", text, re.M)]
    found = [line.partition("  #")[0].strip() for line in lines]
    found += re.findall(r"`([^`\n]+)`", text)
    return [command for command in found if PROGRAM.match(command)]


def test_no_command_is_left_out():
    found = {command: page.name for page in PAGES for command in commands(page)}
    known = {*INSTALLING, *CACHING, *ELSEWHERE}
    left_out = {command: page for command, page in found.items() if command not in known}
    assert found
    assert left_out == {}


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_runs_elsewhere_is_there(command):
    file, _, name = ELSEWHERE[command].partition("::")
    text = (ROOT / file).read_text()
    assert (f"def {name}(" if name.startswith("test_") else name) in text


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone, and an environment that sees the packages of this one but not this project."""
    folder = tmp_path_factory.mktemp("reader")
    listed = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "checkout" / name)
    subprocess.run(["git", "init", "-q"], cwd=folder / "checkout", check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(seen))
    return folder


def as_a_reader(command, folder, venv):
    """Runs a command by a shell in which the environment is active."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_installing_as_the_pages_say(checkout):
    venv = checkout / "venv"
    where = "cd / && python -c 'import mvmr_loss; print(mvmr_loss.__file__)'"
    for command in INSTALLING:
        if command == "pre-commit install":
            shutil.copy(Path(sys.executable).with_name("pre-commit"), venv / "bin")
        as_a_reader(command, checkout / "checkout", venv)
        if command in ("pip install .", "pip install dist/mvmr_loss-*.whl"):
            assert str(venv) in as_a_reader(where, checkout, venv)
            as_a_reader("python -m pip uninstall -y mvmr-loss", checkout, venv)


@pytest.mark.slow
def test_caching_as_the_page_says(tmp_path):
    from PIL import Image
    from skimage import data

    (tmp_path / "FOLDER" / "pictures").mkdir(parents=True)
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(
            tmp_path / "FOLDER" / "pictures" / f"{name}.png"
        )
    outputs = [as_a_reader(command, tmp_path, Path(sys.prefix)) for command in CACHING]
    assert "3" in outputs[-1]


@pytest.mark.slow
def test_import_time():
    output = as_a_reader("python -m benchmarks.import_time --runs 1", ROOT, Path(sys.prefix))
    assert (
        0.8 < float(output.split()[-1]) < 1.5
    )  # 1.13 was measured; 1.8 with torch's compiler in it

"""Two checkouts on one machine: the core, the adapters and the plugin are always of the same one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")

ASKED = """
import site, sys
sys.path.insert(1, sys.argv[1])
site.addsitedir(sys.argv[1])
import mvmr_loss, mvmr_loss.adapters, mvmr_loss.adapters.solo.configs
from mvmr_loss.adapters.solo.__main__ import _let_hydra_find_the_plugin
from mvmr_loss.adapters import GATHER_DISTRIBUTED
_let_hydra_find_the_plugin()
import hydra_plugins.mvmr_loss_solo as plugin
for module in (mvmr_loss, mvmr_loss.adapters, mvmr_loss.adapters.solo.configs, plugin):
    print(module.__file__)
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Two checkouts, and a site folder with an editable installation of the first."""
    folder = tmp_path_factory.mktemp("machine")
    for name in ("first", "second"):
        for part in ("mvmr_loss", "adapters"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / name / part, ignore=ignored)
        for part in FILES:
            shutil.copyfile(ROOT / part, folder / name / part)
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    command = [sys.executable, "-c", code, folder]
    subprocess.run(command, cwd=folder / "first", capture_output=True, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder


def places(machine, working_directory, code=ASKED):
    """Returns where modules come from in a program that sees the editable installation."""
    # Without site: this environment may hold an editable installation of its own.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(is_packages, sys.path))}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, machine / "site"],
        cwd=machine / working_directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def is_packages(path):
    return path.endswith("-packages")


@pytest.mark.parametrize(
    ("start", "wanted"), [("first", "first"), ("second", "second"), (".", "first")]
)
def test_all_is_of_one_checkout(machine, start, wanted):
    found = places(machine, start)
    assert len(found) == 4
    assert all(place.startswith(f"{machine / wanted}/") for place in found), found


def test_a_core_without_its_adapters_takes_no_others(machine):
    shutil.copytree(machine / "second" / "mvmr_loss", machine / "alone" / "mvmr_loss")
    code = """
import site, sys
sys.path.insert(1, sys.argv[1])
site.addsitedir(sys.argv[1])
try:
    import mvmr_loss.adapters.solo
except ModuleNotFoundError as error:
    print(error)
"""
    (said,) = places(machine, "alone", code)
    assert said == f"mvmr_loss.adapters must be in {machine / 'alone' / 'adapters'} but is not."

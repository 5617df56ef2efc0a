"""The tests in other environments: ``nox --list`` tells which, ``nox -s NAME`` runs one.

``newest`` and ``lowest`` install everything, torch included, for each Python that is there. Sessions
``..._here``, and those of the hosts whose requirements clash with the others', see the packages of the
environment that runs nox, with its torch, and add what differs: some hundred megabytes and not five
gigabytes. What would be skipped in a host's tests fails.
"""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["stable_pretraining", "torchdistill", "wheel_here", "lowest_here"]
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
# What needs neither a host nor a checkout of one.
CORE: tuple[str, ...] = (
    "test_loss.py",
    "test_heads.py",
    "test_normalization.py",
    "test_package.py",
)
CORE += ("dependence", "representations", "cpu", "cache")
# What the lowest versions of pure Python packages are tried with, on any torch.
PURE = ("kornia", "lightly", "timm")


def lower_bounds() -> dict[str, str]:
    """Returns each package that setup.cfg names and its lowest version."""
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values():
        lines += extra.splitlines()
    found = (re.match(r"([\w-]+)(?:\[\w+\])?\s*[>=]=\s*([\d.]+)", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def see_here(session: nox.Session) -> None:
    """Lets a session's environment import what the one that runs nox has, after its own."""
    site = session.run(
        "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True
    )
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (Path(str(site).strip()) / "zz_here.pth").write_text("\n".join(paths) + "\n")


def run_tests(session: nox.Session, *tests: str) -> None:
    """Runs tests, those that are not slow unless the command line says otherwise."""
    options = session.posargs or ["-m", "not slow"]
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests)


def test_host(session: nox.Session, requirements: list[str], tests: list[str]) -> None:
    """Installs this package and a host beside what is installed here, and runs the host's tests."""
    see_here(session)
    session.install("--editable", *requirements)
    session.run(
        *("python", "-m", "pytest", *tests, *session.posargs), env={"MVMR_LOSS_NO_SKIPS": "1"}
    )


@nox.session
def stable_pretraining(session: nox.Session) -> None:
    """stable-pretraining, and the metrics with a torchmetrics that solo-learn cannot have."""
    test_host(
        session,
        [".[stable-pretraining]", "torchmetrics>=1.0"],
        ["tests/adapters/test_stable_pretraining_host.py", "tests/test_metrics.py"],
    )


@nox.session
def torchdistill(session: nox.Session) -> None:
    """torchdistill, which needs a newer torch than the package does."""
    test_host(
        session,
        [".[torchdistill]"],
        ["tests/adapters/test_torchdistill.py", "adapters/torchdistill"],
    )


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """The suite on the newest version of everything."""
    session.install(".[dev]")
    run_tests(session)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The suite on the lowest versions that setup.cfg allows, which pip cannot ask for."""
    session.install("uv")
    here = ("--python", str(Path(session.bin) / "python"))
    lowest_versions = ("--resolution", "lowest-direct")
    session.run("uv", "pip", "install", *here, *lowest_versions, "--editable", ".[dev]")
    check = "import torch; assert torch.__version__.startswith('2.6.0'), torch.__version__"
    session.run("python", "-c", check)
    run_tests(session)


@nox.session
def lowest_here(session: nox.Session) -> None:
    """The core, and the lightly adapter, on the lowest kornia, lightly and timm and this torch."""
    see_here(session)
    bounds = lower_bounds()
    session.install(*(f"{name}=={bounds[name]}" for name in PURE))
    session.install("--no-deps", "--no-build-isolation", "setuptools", "-e", ".")
    for name in PURE:
        check = f"import {name}; assert {name}.__version__ == {bounds[name]!r}, {name}.__version__"
        session.run("python", "-c", check)
    run_tests(session, *(f"tests/{name}" for name in CORE), "tests/adapters/test_lightly_method.py")


def build(session: nox.Session) -> dict[str, str]:
    """Builds and checks wheel and sdist; returns the path of each."""
    folder = Path(session.create_tmp()).resolve() / "dist"
    session.run("python", "-m", "build", "--outdir", str(folder), str(ROOT))
    paths = {"wheel" if p.suffix == ".whl" else "sdist": str(p) for p in folder.iterdir()}
    session.run("python", "-m", "twine", "check", "--strict", *paths.values())
    return paths


def run_core_tests(session: nox.Session) -> None:
    """Runs the core's tests away from the checkout, whose package would be imported otherwise."""
    folder = Path(session.create_tmp()).resolve()
    for name in ("tests", "benchmarks", ".ci"):
        session.run("cp", "-r", str(ROOT / name), str(folder), external=True)
    for name in ("pyproject.toml", "setup.cfg", "conftest.py"):
        session.run("cp", str(ROOT / name), str(folder), external=True)
    session.chdir(folder)
    check = "import mvmr_loss as m; assert 'site-packages' in m.__file__, m.__file__"
    session.run("python", "-c", check)
    run_tests(session, *(f"tests/{name}" for name in CORE if name != "test_package.py"))


@nox.session
def wheel_here(session: nox.Session) -> None:
    """Wheel and sdist are built and checked, and the core's tests run from the installed wheel."""
    see_here(session)
    session.install("--no-deps", "--force-reinstall", build(session)["wheel"])
    run_core_tests(session)


@nox.session
@nox.parametrize("kind", ["wheel", "sdist"])
def fresh(session: nox.Session, kind: str) -> None:
    """The core's tests from a wheel, or an sdist, and what the index brings for it."""
    session.install("build", "twine")
    session.install(f"{build(session)[kind]}[tests]")
    run_core_tests(session)


@nox.session
def audit(session: nox.Session) -> None:
    """Known faults of what the package requires, as far as the index tells them."""
    session.install("pip-audit")
    requirements = Path(session.create_tmp()) / "requirements.txt"
    config = ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    requirements.write_text(config["options"]["install_requires"])
    session.run("pip-audit", "-r", str(requirements))

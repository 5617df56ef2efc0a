"""Environments of their own for the hosts whose requirements clash with the others'.

    nox -s stable_pretraining torchdistill

nox runs in the environment of the tests. A host's environment sees all that is installed there, torch
above all, by a ``.pth`` file, and has of its own what the host needs in another version; so it is some
hundred megabytes and not five gigabytes. What would be skipped fails.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def test_host(session: nox.Session, requirements: list[str], tests: list[str]) -> None:
    """Installs this package and a host beside what is installed here, and runs the host's tests."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = session.run("python", "-c", code, silent=True)
    here = Path(str(own).strip()) / "zz_environment_of_the_tests.pth"
    here.write_text(sysconfig.get_path("purelib"))
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

"""What pytest must not import for doctests, what skipped tests mean, and the property tests' seed."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# They subclass solo-learn's classes, and a checkout of solo-learn is on no path here.
collect_ignore = ["adapters/solo/method.py", "adapters/solo/regularizer.py"]
# They need a newer torch, and a newer timm, than the package does.
if importlib.util.find_spec("torchdistill") is None:
    collect_ignore.append("adapters/torchdistill")
_timm = importlib.util.find_spec("timm")
if _timm is None or not (Path(str(_timm.origin)).parent / "task").is_dir():
    collect_ignore.append("adapters/timm")


# Drawn once, so that all processes of a run have the same.
if os.environ.get("MVMR_PROPERTY_SEED") == "new":
    os.environ["MVMR_PROPERTY_SEED"] = str(random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    """Says the seed of the property tests' slow run, where it is seen of a run that passes too."""
    return f"MVMR_PROPERTY_SEED={os.environ.get('MVMR_PROPERTY_SEED', '0')}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Judges a file that is skipped."""
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Judges a test that is skipped."""
    return _judged((yield))


def _judged(report: Any) -> Any:
    """Turns a skip into a failure where MVMR_LOSS_NO_SKIPS is set, as in a host's environment."""
    if os.environ.get("MVMR_LOSS_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"MVMR_LOSS_NO_SKIPS is set, but this was skipped: {reason}"
    return report

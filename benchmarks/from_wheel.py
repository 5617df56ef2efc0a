"""Runs a benchmark against an installed wheel instead of the sources beside it.

    python -m benchmarks.from_wheel benchmarks.speed --again
    python -m benchmarks.from_wheel --wheel dist/mvmr_loss-0.2.0-py3-none-any.whl benchmarks.cache

Without --wheel one is built from this checkout. It is installed, without its requirements, into a
folder of its own that comes before all others; results are written into this checkout as ever, and
say ``"package": "wheel"``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, arguments: Sequence[str], wheel: Path | None = None) -> int:
    """Builds a wheel if none is given, installs it aside and runs a module with it.

    Args:
        module: As after ``python -m``.
        arguments: Of the module; paths are those of the working directory.
        wheel: The wheel.

    Returns:
        The module's exit status.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(ROOT)]
            subprocess.run([*pip, *build], check=True)
            (wheel,) = Path(folder).glob("*.whl")
        site = Path(folder) / "site"
        subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
        # Beside the benchmarks lie the sources, which Python would take first, also in the processes
        # that a benchmark starts: from here it sees the benchmarks alone.
        (site / "benchmarks").symlink_to(ROOT / "benchmarks")
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            check=False,
        ).returncode


def main(command: Sequence[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.from_wheel", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--wheel", type=Path, help="the wheel; default: one built from here")
    parser.add_argument("module", help="what runs, such as benchmarks.speed")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(command)
    raise SystemExit(run(given.module, given.arguments, given.wheel))


if __name__ == "__main__":
    main()

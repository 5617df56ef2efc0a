"""Tells what is installed and which kernels for CPUs are used: ``python -m mvmr_loss``."""

from __future__ import annotations

import os
import sys

import torch

from mvmr_loss import __version__, kernels


def main() -> int:
    """Prints a line for each kernel, and returns 1 if one is off that nobody forbade."""
    print(f"mvmr-loss {__version__}, torch {torch.__version__}, kernels for CPUs:")
    found = kernels()
    for status in found:
        print(f"{status.name:12}{'on' if status.on else 'off: ' + status.reason}")
    forbidden = os.environ.get("MVMR_LOSS_NATIVE") == "0"
    return int(not forbidden and not all(status.on for status in found))


if __name__ == "__main__":
    sys.exit(main())

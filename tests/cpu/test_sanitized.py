"""The kernels under sanitizers; more cases by ``python tests/cpu/sanitized.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

from mvmr_loss._cpu import build

SCRIPT = Path(__file__).with_name("sanitized.py")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels_on")]


def run(*arguments):
    compiler = subprocess.run(
        [build._compiler()[0], "--version"], capture_output=True, text=True, check=True
    )
    if "Free Software Foundation" not in compiler.stdout:
        pytest.skip("needs GCC, whose address sanitizer can be preloaded")
    command = [sys.executable, "-W", "ignore", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)


def test_no_fault_is_found():
    done = run("--cases", "80", "--seed", "1")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stdout.endswith("80 cases with seed 1: no fault\n")


@pytest.mark.parametrize(
    ("fault", "said", "where"),
    [
        ("sketch", "AddressSanitizer: heap-buffer-overflow", "folded_sign_sketch"),
        ("gram", "AddressSanitizer: heap-buffer-overflow", "centered_gram"),
        ("scattering", "AddressSanitizer: heap-buffer-overflow", "scatterer_run"),
        ("signed", "runtime error: signed integer overflow", "gram.cpp"),
    ],
)
def test_a_fault_is_found(fault, said, where):
    done = run("--overrun", fault)
    assert done.returncode != 0
    assert said in done.stderr, done.stderr[-3000:]
    assert where in done.stderr

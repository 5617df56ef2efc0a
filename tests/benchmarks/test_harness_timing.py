"""What is timed finds memory where the step before left it."""

import subprocess
import sys

import pytest

COUNT = """
import resource
import torch
from benchmarks.harness import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(12)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_not_asked_for_again():
    counts = [
        int(subprocess.check_output([sys.executable, "-c", COUNT.format(kept=kept)]))
        for kept in (False, True)
    ]
    assert counts[1] < 100 < counts[0]

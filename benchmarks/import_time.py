"""How long `import mvmr_loss` takes beside `import torch, kornia`, in fresh processes, interleaved.

    python -m benchmarks.import_time --runs 15

Prints medians of the processor time (user and system, of the whole process), which other work on the
machine disturbs less than the clock's, and the ratio.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

PROGRAMS = {"torch, kornia": "import torch, kornia", "mvmr_loss": "import mvmr_loss"}


def cpu_seconds(program: str) -> float:
    """Returns the processor time of a fresh process that runs a program, in seconds."""
    # Compiled files of the package are kept, as an installer makes them.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=kept)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(runs: int) -> dict[str, list[float]]:
    """Returns each program's times; a first run of each, which fills the disk's cache, is left out."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for run in range(runs + 1):
        for name, program in PROGRAMS.items():
            seconds = cpu_seconds(program)
            if run:
                times[name].append(seconds)
    return times


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    times = measure(parser.parse_args().runs)
    for name, values in times.items():
        print(
            f"{name:15} {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
        )
    medians = [statistics.median(values) for values in times.values()]
    print(f"ratio {medians[1] / medians[0]:.3f}")


if __name__ == "__main__":
    main()

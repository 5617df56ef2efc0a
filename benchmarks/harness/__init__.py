"""What every benchmark shares: planned runs, one record schema, interleaved timing, pages.

The contract is in benchmarks/README.md.
"""

from benchmarks.harness.loops import progress
from benchmarks.harness.pages import plot_points, save_figure, spread, table, write_between
from benchmarks.harness.records import (
    atomic_path,
    environment,
    portable,
    validate,
    write_json,
)
from benchmarks.harness.runs import Run, load, plain_errors, record, run_all
from benchmarks.harness.timing import Ratio, interleaved, medians, peak_memory, ratio

__all__ = [
    "Ratio",
    "Run",
    "atomic_path",
    "environment",
    "interleaved",
    "load",
    "medians",
    "peak_memory",
    "plain_errors",
    "plot_points",
    "portable",
    "progress",
    "ratio",
    "record",
    "run_all",
    "save_figure",
    "spread",
    "table",
    "validate",
    "write_between",
    "write_json",
]

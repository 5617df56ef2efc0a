"""What every benchmark shares: planned runs, one record schema, interleaved timing, pages.

The contract is in benchmarks/README.md.
"""

from benchmarks.harness.graphs import RepeatedStep, repeatable_adam
from benchmarks.harness.loops import progress
from benchmarks.harness.pages import (
    plot_points,
    save_figure,
    seeds,
    spread,
    table,
    usual_device,
    write_between,
)
from benchmarks.harness.records import (
    atomic_path,
    device_of,
    environment,
    portable,
    validate,
    write_json,
)
from benchmarks.harness.runs import (
    Run,
    check_run,
    load,
    place_of_best,
    plain_errors,
    record,
    run_all,
    run_in_processes,
    wait_for,
)
from benchmarks.harness.timing import (
    Ratio,
    interleaved,
    keep_freed_memory,
    medians,
    peak_memory,
    ratio,
)

__all__ = [
    "Ratio",
    "RepeatedStep",
    "Run",
    "atomic_path",
    "check_run",
    "device_of",
    "environment",
    "interleaved",
    "keep_freed_memory",
    "load",
    "medians",
    "peak_memory",
    "place_of_best",
    "plain_errors",
    "plot_points",
    "portable",
    "progress",
    "ratio",
    "record",
    "repeatable_adam",
    "run_all",
    "run_in_processes",
    "save_figure",
    "seeds",
    "spread",
    "table",
    "usual_device",
    "validate",
    "wait_for",
    "write_between",
    "write_json",
]

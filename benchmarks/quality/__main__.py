"""Runs what is planned and not there yet: ``python -m benchmarks.quality --data FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness import Run, plain_errors, run_all, run_in_processes
from benchmarks.quality.plan import PLANS, plan
from benchmarks.quality.training import train

HERE = Path(__file__).parent


def chosen_runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yields the runs that are asked for, in the order of the plans."""
    data = arguments.data.name if arguments.data else "photographs"
    for name in arguments.plan:
        for run in plan(name, data, arguments.results):
            row = run.name.split("/")[1]
            if (
                (not arguments.rows or row.startswith(tuple(arguments.rows)))
                and (not arguments.seeds or run.seed in arguments.seeds)
                and (not arguments.epochs or run.settings["epochs"] in arguments.epochs)
            ):
                yield run._replace(settings={**run.settings, "bf16": arguments.bf16})


def main(command: Sequence[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with train/ and test/; default: photographs")
    add("--plan", choices=PLANS, nargs="+", default=["selection", "main"], help="in this order")
    add("--rows", nargs="*", help="only rows whose names begin so")
    add("--seeds", type=int, nargs="*", help="only these seeds")
    add("--epochs", type=int, nargs="*", help="only these lengths")
    add("--results", type=Path, default=HERE / "results", help="folder of the results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="run encoders in bfloat16 where autocast has it so")
    add("--threads", type=int, default=1, help="threads on a CPU")
    add("--limit", type=int, help="at most so many runs")
    add("--minutes", type=float, help="begin no run later")
    add("--jobs", type=int, default=1, help="so many processes share the plan")
    command = sys.argv[1:] if command is None else command
    arguments = parser.parse_args(command)
    if arguments.jobs > 1:
        run_in_processes(arguments.jobs, ["benchmarks.quality", *command, "--jobs", "1"])
        return
    torch.set_num_threads(arguments.threads)
    with plain_errors():
        run_all(
            chosen_runs(arguments),
            arguments.results,
            lambda run: train(
                run.settings,
                run.seed or 0,
                None if run.settings["data"] == "photographs" else arguments.data,
                arguments.device,
            ),
            limit=arguments.limit,
            minutes=arguments.minutes,
        )


if __name__ == "__main__":
    main()

"""Runs what is planned and not there yet: ``python -m benchmarks.quality --data FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.harness import plain_errors, run_all
from benchmarks.quality.plan import PLANS, plan
from benchmarks.quality.training import train

HERE = Path(__file__).parent


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with train/ and test/; default: photographs"
    )
    parser.add_argument("--plan", choices=PLANS, default="main", help="which rows")
    parser.add_argument("--rows", nargs="*", help="only rows whose names begin so")
    parser.add_argument("--seeds", type=int, nargs="*", help="only these seeds")
    parser.add_argument("--epochs", type=int, nargs="*", help="only these lengths")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of the results"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--limit", type=int, help="at most so many runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with plain_errors():
        chosen = [
            run
            for run in plan(
                arguments.plan, arguments.data.name if arguments.data else "photographs"
            )
            if (not arguments.rows or run.name.split("/")[1].startswith(tuple(arguments.rows)))
            and (not arguments.seeds or run.seed in arguments.seeds)
            and (not arguments.epochs or run.settings["epochs"] in arguments.epochs)
        ]
        run_all(
            chosen,
            arguments.results,
            lambda run: train(run.settings, run.seed, arguments.data, arguments.device),
            limit=arguments.limit,
        )


if __name__ == "__main__":
    main()

"""Measures what a store of representations costs and changes; writes JSON, RESULTS.md and a plot.

python -m benchmarks.cache                          all of it, on photographs of scikit-image
python -m benchmarks.cache --images CIFAR           accuracies on CIFAR/train and CIFAR/test
python -m benchmarks.cache --only steps values      some parts, beside the others' last results

Each training run has a file of its own; runs whose file is there are not repeated.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cache import accuracy, figures, steps
from benchmarks.cache.report import write_report
from benchmarks.harness import Run, plain_errors, run_all

FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts named on the command line and writes what they found."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cache",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parts = ("steps", "store", "values", "accuracy")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds of the steps")
    parser.add_argument("--count", type=int, default=2048, help="images in the store that is timed")
    parser.add_argument("--batch-size", type=int, default=64, help="images a timed step")
    parser.add_argument("--images", type=Path, help="folder of train/ and test/, for the accuracy")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training runs")
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=accuracy.CONFIGURATIONS,
        default=list(accuracy.CONFIGURATIONS),
        metavar="NAME",
        help="training runs: " + "; ".join(accuracy.CONFIGURATIONS),
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with plain_errors():
        _run(options)


def _run(options: argparse.Namespace) -> None:
    """Measures the parts, and writes each when it is done."""

    def each_size(measure: Callable[[int, Path], Any]) -> dict[str, Any]:
        measured = {}
        for size in (32, 96):
            with tempfile.TemporaryDirectory() as folder:
                measured[str(size)] = measure(size, Path(folder))
        return measured

    def step_times() -> dict[str, dict[str, float]]:
        measured = {}
        for name in steps.networks():
            with tempfile.TemporaryDirectory() as folder:
                measured[name] = steps.step_times(
                    name, Path(folder), options.repeats, options.batch_size
                )
        return measured

    # Part -> what determines it, and what measures it.
    count = min(256, options.count)
    parts: dict[str, tuple[dict[str, int], Callable[[], dict[str, Any]]]] = {
        "steps": ({"repeats": options.repeats, "batch_size": options.batch_size}, step_times),
        "store": (
            {"count": options.count},
            lambda: each_size(
                lambda size, folder: figures.store_figures(size, options.count, folder)
            ),
        ),
        "values": (
            {"count": count},
            lambda: each_size(lambda size, folder: figures.value_figures(size, count, folder)),
        ),
    }
    results = options.output / "results"
    measured = [Run(name, parts[name][0]) for name in options.only if name in parts]
    run_all(measured, results, lambda run: parts[run.name][1](), again=True)
    if "accuracy" in options.only:
        accuracy.run_missing(
            options.images,
            results,
            epochs=options.epochs,
            seeds=options.seeds,
            configurations=options.configurations,
        )
    write_report(options.output)
    print(f"wrote {options.output / 'RESULTS.md'}")


if __name__ == "__main__":
    main()

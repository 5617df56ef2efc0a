"""Runs the training of this study over settings of the loss and seeds; writes RESULTS.md.

    python -m benchmarks.plain_pytorch.run photographs --configurations "five representations"
    python -m benchmarks.plain_pytorch.run cifar10-subset --seeds 0 1 -- \
        --train CIFAR/train --test CIFAR/test --color-jitter 0.4 --epochs 10

What follows ``--`` goes to ``python -m benchmarks.plain_pytorch``. Each run's result is a file of
its own, written when the run ends; runs whose file is there are not repeated: the same command
continues after a stop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Run, load, plain_errors, run_all, spread, table, write_between
from benchmarks.plain_pytorch import training

HERE = Path(__file__).parent
CONFIGURATIONS = {
    "five representations": ["--representation-weight", "1"],
    "none": ["--representations", "none"],
    "five, release's sign": ["--representation-weight", "-1"],
}


def run_name(study: str, configuration: str, seed: int) -> str:
    """Returns the name of one run."""
    slug = "".join(c if c.isalnum() else "_" for c in configuration.replace("'", ""))
    return f"{study}/{slug.replace('__', '_')}-seed{seed}"


def run_missing(
    study: str,
    seeds: Sequence[int],
    arguments: Sequence[str],
    results: Path = HERE / "results",
    configurations: Sequence[str] = tuple(CONFIGURATIONS),
) -> None:
    """Runs every configuration and seed that has no result yet.

    Args:
        study: Its results are in a folder of this name.
        seeds: One run each, of each configuration.
        arguments: Passed to ``python -m benchmarks.plain_pytorch``.
        results: Folder of all studies.
        configurations: Keys of ``CONFIGURATIONS``.

    Raises:
        ValueError: If a result is there that other settings made.
        KeyboardInterrupt: If a run is interrupted; it is not kept.
    """

    def options(configuration: str, seed: int) -> argparse.Namespace:
        words = [*arguments, *CONFIGURATIONS[configuration], "--seed", str(seed)]
        return training.parse_arguments(words)

    def run_one(run: Run) -> dict[str, Any]:
        settings = options(run.settings["configuration"], run.seed or 0)
        with tempfile.TemporaryDirectory() as output:
            settings.output = Path(output)
            figures = training.run(settings)
        if figures["interrupted"]:
            raise KeyboardInterrupt
        return figures

    plan = [
        Run(
            run_name(study, name, seed),
            {"configuration": name, **training.settings_of(options(name, seed))},
            seed,
        )
        for seed in seeds
        for name in configurations
    ]
    run_all(plan, results, run_one)
    write_table(results)


def write_table(results: Path = HERE / "results") -> None:
    """Puts the tables of all results into RESULTS.md, between its two marks."""
    parts = []
    for study in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = load(study)
        if not runs:
            continue
        machine, settings, found = (runs[0][name] for name in ("machine", "settings", "figures"))
        parts += [
            f"### {study.name}",
            f"{found['images']['train']:,} training and {found['images']['test']:,} test images of "
            f"{len(found['classes'])} classes at {settings['image_size']} pixels, "
            f"{settings['epochs']} epochs; {machine['cpu']}, "
            f"{machine['threads']} threads, torch {runs[0]['versions']['torch']}. "
            "Top-1 accuracy in %, mean ± standard deviation over seeds.",
        ]
        # The same whatever the loss: one run a seed counts.
        once = list({run["seed"]: run for run in runs}.values())
        rows = [_row(baseline, once, baseline) for baseline in ("raw pixels", "untrained")]
        for name in CONFIGURATIONS:
            chosen = [run for run in runs if run["settings"]["configuration"] == name]
            if chosen:
                rows.append(_row(f"trained, {name}", chosen, "trained"))
        header = ["features", "seeds", "kNN", "linear", "training, CPU time (s)"]
        parts.append(table(header, rows))
    write_between(results.parent / "RESULTS.md", "table", "\n\n".join(parts))


def _row(label: str, runs: Sequence[dict[str, Any]], features: str) -> list[str]:
    """Returns a table's row: mean and standard deviation over the runs."""
    accuracies = [run["figures"]["accuracy"][features] for run in runs]
    cells = [
        spread([values[probe]["top1"] for values in accuracies]) for probe in ("knn", "linear")
    ]
    seconds = statistics.mean(run["figures"]["training_cpu_seconds"] for run in runs)
    seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs))
    return [label, seeds, *cells, f"{seconds:.0f}" if features == "trained" else ""]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plain_pytorch.run",
        description="Trains with five representations, none, and the release's sign.",
        epilog="What follows -- goes to python -m benchmarks.plain_pytorch.",
    )
    parser.add_argument("name", help="of the study: the folder of its results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS)
    )
    # Not left to argparse, which lets "--" end the options only where no others precede it.
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, example = parser.parse_args(given[:end]), given[end + 1 :]
    with plain_errors():
        run_missing(
            options.name,
            options.seeds,
            example,
            configurations=options.configurations,
        )


if __name__ == "__main__":
    main()

"""Runs the training of this study over settings of the loss and seeds; writes RESULTS.md.

    python -m benchmarks.training.run photographs --configurations "five representations"
    python -m benchmarks.training.run cifar10-subset --seeds 0 1 -- \
        --train CIFAR/train --test CIFAR/test --color-jitter 0.4 --epochs 10

What follows ``--`` goes to ``python -m benchmarks.plain_pytorch``. Each run's result is a file of
its own, written when the run ends; runs whose file is there are not repeated: the same command
continues after a stop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.records import atomic_path, portable, write_json
from benchmarks.plain_pytorch import training

HERE = Path(__file__).parent
CONFIGURATIONS = {
    "five representations": ["--representation-weight", "1"],
    "none": ["--representations", "none"],
    "five, release's sign": ["--representation-weight", "-1"],
}
# What does not change the result of a run.
INCIDENTAL = {"seed", "output", "device"}


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that make a run's result, as they are written."""
    return {name: portable(value) for name, value in values.items() if name not in INCIDENTAL}


def result_path(name: str, configuration: str, seed: int, results: Path) -> Path:
    """Returns the file of one run."""
    slug = "".join(c if c.isalnum() else "_" for c in configuration.replace("'", ""))
    return results / name / f"{slug.replace('__', '_')}-seed{seed}.json"


def run_missing(
    name: str,
    seeds: Sequence[int],
    arguments: Sequence[str],
    results: Path = HERE / "results",
    configurations: Sequence[str] = tuple(CONFIGURATIONS),
) -> None:
    """Runs every configuration and seed that has no result yet.

    Args:
        name: Of the study; its results are in a folder of this name.
        seeds: One run each, of each configuration.
        arguments: Passed to ``python -m benchmarks.plain_pytorch``.
        results: Folder of all studies.
        configurations: Keys of ``CONFIGURATIONS``.

    Raises:
        ValueError: If a result is there that other settings made.
        SystemExit: If a run is interrupted.
    """
    for seed in seeds:
        for configuration in configurations:
            options = CONFIGURATIONS[configuration]
            path = result_path(name, configuration, seed, results)
            with tempfile.TemporaryDirectory() as output:
                settings = training.parse_arguments(
                    [*arguments, *options, "--seed", str(seed), "--output", output]
                )
                if path.exists():
                    if json.loads(path.read_text())["settings"] != settings_of(vars(settings)):
                        raise ValueError(
                            f"{portable(path)} was made with other settings; give the study "
                            "another name or remove the file."
                        )
                    print(f"{path.stem}: done before")
                    continue
                print(f"{path.stem}: running", flush=True)
                metrics = training.run(settings)
            if metrics["interrupted"]:
                raise SystemExit("Interrupted: run the same command again to continue.")
            metrics["settings"] = settings_of(metrics["settings"])
            write_json(path, {"configuration": configuration, **metrics})
            write_table(results)


def write_table(results: Path = HERE / "results") -> None:
    """Puts the table of all results into RESULTS.md, between its two marks."""
    lines = []
    for study in sorted(path for path in results.iterdir() if path.is_dir()):
        runs = [json.loads(path.read_text()) for path in sorted(study.glob("*.json"))]
        if not runs:
            continue
        first = runs[0]
        lines += [
            f"### {study.name}",
            "",
            f"{first['images']['train']:,} training and {first['images']['test']:,} test images of "
            f"{len(first['classes'])} classes at {first['settings']['image_size']} pixels, "
            f"{first['settings']['epochs']} epochs; {first['machine']['cpu']}, "
            f"{first['machine']['threads']} threads, torch {first['versions']['torch']}. "
            "Top-1 accuracy in %, mean ± standard deviation over seeds.",
            "",
            "| features | seeds | kNN | linear | training, CPU time (s) |",
            "| --- | --- | --- | --- | --- |",
        ]
        for baseline in ("raw pixels", "untrained"):
            # The same whatever the loss: one run a seed counts.
            by_seed = {run["seed"]: run for run in runs}
            lines.append(_row(baseline, list(by_seed.values()), baseline))
        for configuration in CONFIGURATIONS:
            chosen = [run for run in runs if run["configuration"] == configuration]
            if chosen:
                lines.append(_row(f"trained, {configuration}", chosen, "trained"))
        lines.append("")
    page = results.parent / "RESULTS.md"
    before, mark, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    with atomic_path(page) as temporary:
        temporary.write_text(before + mark + "\n".join(lines) + end + after)


def _row(label: str, runs: Sequence[dict[str, Any]], features: str) -> str:
    """Returns a table's row: mean and standard deviation over the runs."""
    cells = []
    for probe in ("knn", "linear"):
        values = [run["accuracy"][features][probe]["top1"] for run in runs]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    seconds = statistics.mean(run["training_cpu_seconds"] for run in runs)
    cells.append(f"{seconds:.0f}" if features == "trained" else "")
    seeds = ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"]))
    return f"| {label} | {seeds} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.run",
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
    try:
        run_missing(
            options.name,
            options.seeds,
            example,
            configurations=options.configurations,
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()

"""The page made from what was measured on a GPU."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.harness import load, medians, ratio, table, write_between

ALONE = "network alone"


def write_report(folder: Path) -> None:
    """Writes the marked part of RESULTS.md; without results it says that there are none.

    Args:
        folder: Where RESULTS.md and ``results`` are.
    """
    records = load(folder / "results")
    parts, steps, times, counts = [], [], [], []
    for record in records:
        told, figures = record["settings"], record["figures"]
        if told["part"] == "step":
            where = (
                f"{told['backbone']}, {told['side']} px, {told['images']} images, {told['mode']}"
            )
            for name, rounds in figures["times"].items():
                memory = figures.get("memory", {}).get(name)
                steps.append(
                    [
                        *(where, name, f"{1e3 * statistics.median(rounds):.4g} ms"),
                        f"{ratio(rounds, figures['times'][ALONE]).value:.3f}",
                        None if memory is None else f"{memory / 2**20:.0f} MiB",
                    ]
                )
        elif told["part"] == "representations":
            where = f"{told['images']} images of {told['side']} px"
            for group in figures["times"].values():
                times += [[where, n, f"{1e3 * s:.4g} ms"] for n, s in medians(group).items()]
        elif told["part"] == "launches":
            counts += [[n, c["eager"], c.get("compiled")] for n, c in figures.items()]
        else:
            count, measured = figures["steps_of_the_pretraining"], figures["seconds"]
            # By the mean: some steps wait for images, and all of them do so again and again.
            hours, computing = (
                count * statistics.mean(seconds) / 3600
                for seconds in (measured, figures["seconds_computing"])
            )
            parts.append(
                f"The pretraining of the {told['preset']} preset on STL10: {hours:.1f} hours, "
                f"{computing:.1f} without waiting for images ({count:,} steps, by the mean of "
                f"{len(measured)})."
            )
    if steps:
        header = ["step", "with", "median", "of the network alone", "memory"]
        parts.append(table(header, steps))
    if times:
        parts.append(table(["representation of", "which", "median"], times))
    if counts:
        parts.append(table(["kernels started by", "eager", "compiled"], counts))
    text = "There are no figures: they were not measured."
    if records:
        first = records[0]
        machine = ", ".join(first["machine"]["gpus"]) or first["machine"]["cpu"]
        where = f"{machine}; torch {first['versions']['torch']}; {first['date']}."
        text = "\n\n".join([where, *parts])
    write_between(folder / "RESULTS.md", "gpu", text)

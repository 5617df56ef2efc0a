"""The table and the plot made from the results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.distillation.methods import METHODS, VARIANTS
from benchmarks.harness.records import atomic_path

PROBES = ("knn", "linear")
Results = Mapping[str, Sequence[Mapping[str, Any]]]


def read_results(folder: Path) -> Results:
    """Reads the study's results: method -> one a seed, of the methods that have any."""
    found = {
        method: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{method}-seed*"))]
        for method in METHODS
    }
    return {method: runs for method, runs in found.items() if runs}


def write_report(folder: Path) -> None:
    """Puts the tables into RESULTS.md, between its two marks, and draws the plot.

    Args:
        folder: That of RESULTS.md and ``results``.
    """
    results = read_results(folder / "results")
    teacher = json.loads((folder / "results" / "teacher.json").read_text())
    lines = [*_study(results, teacher), *_selection(folder / "results")]
    page = folder / "RESULTS.md"
    text = page.read_text() if page.exists() else "<!-- table -->\n<!-- end of table -->\n"
    before, mark, rest = text.partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    with atomic_path(page) as temporary:
        temporary.write_text(before + mark + "\n".join(lines) + "\n" + end + after)
    if results:
        with atomic_path(folder / "distillation.png") as temporary:
            plot(results, teacher).savefig(temporary, dpi=110)


def _study(results: Results, teacher: Mapping[str, Any]) -> list[str]:
    """Returns the lines about the study itself."""
    if not results:
        return []
    first = next(iter(results.values()))[0]
    accuracy = teacher["accuracy"]
    lines = [
        f"Teacher: {teacher['parameters']:,} parameters, classifier "
        f"{accuracy['classifier']['top1']:.1f} %, its features kNN {accuracy['knn']['top1']:.1f} %, "
        f"linear {accuracy['linear']['top1']:.1f} %. Student: {first['parameters']:,} parameters, "
        f"{first['epochs']} epochs, {first['student_passes']:,} images through it in every run; "
        f"{first['machine']['cpu']}, {first['machine']['threads']} thread(s), torch "
        f"{first['versions']['torch']}. Top-1 accuracy in %, mean ± standard deviation over seeds.",
        "",
        "| method | seeds | kNN | linear | training, CPU time (s) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for method, runs in results.items():
        cells = [_spread([run["accuracy"][probe]["top1"] for run in runs]) for probe in PROBES]
        seconds = statistics.mean(run["training_cpu_seconds"] for run in runs)
        seeds = ", ".join(str(run["seed"]) for run in runs)
        lines.append(f"| {METHODS[method].label} | {seeds} | {' | '.join(cells)} | {seconds:.0f} |")
    return [*lines, "", "![Linear accuracy of each method](distillation.png)", ""]


def _selection(folder: Path) -> list[str]:
    """Returns the lines about the choice of options, and about variants."""
    lines = [
        "Options, chosen by linear accuracy on held-out training images:",
        "",
        "| method | option | kNN | linear |",
        "| --- | --- | --- | --- |",
    ]
    for method in METHODS:
        paths = sorted((folder / "selection").glob(f"{method}-[0-9].json"))
        lines += [f"| {METHODS[method].label} | {_tried(path)}" for path in paths]
    paths = [path for name in VARIANTS if (path := folder / "variants" / f"{name}.json").exists()]
    lines += ["", "Variants of MV-MR on the same images:", ""] if paths else []
    lines += ["| variant | options | kNN | linear |", "| --- | --- | --- | --- |"] if paths else []
    lines += [f"| {path.stem.replace('-', ' ')} | {_tried(path)}" for path in paths]
    return lines


def _tried(path: Path) -> str:
    """Returns the end of a table's row: options and accuracies."""
    run = json.loads(path.read_text())
    options = ", ".join(f"{name} = {value}" for name, value in run["options"].items())
    return " | ".join([options, *(f"{run['accuracy'][p]['top1']:.1f}" for p in PROBES)]) + " |"


def _spread(values: Sequence[float]) -> str:
    """Returns mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def plot(results: Results, teacher: Mapping[str, Any]) -> Figure:
    """Draws the linear accuracy of each method, a point a seed, beside the teacher's."""
    figure = Figure(figsize=(8, 0.5 * len(results) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, (method, runs) in enumerate(results.items()):
        values = [run["accuracy"]["linear"]["top1"] for run in runs]
        color = "#1f5fa8" if method.startswith("mvmr") else "#b0bccb"
        axes.barh(place, statistics.mean(values), 0.7, color=color)
        axes.plot(values, [place] * len(values), "o", color="black", ms=4, mfc="none")
        axes.annotate(
            f"{statistics.mean(values):.1f}",
            (max(values), place),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    best = teacher["accuracy"]["classifier"]["top1"]
    axes.axvline(best, color="black", lw=0.8, ls=":")
    axes.annotate(
        f"teacher {best:.1f}",
        (best, 1),
        (3, -10),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
    )
    axes.set_yticks(range(len(results)), [METHODS[method].label for method in results])
    axes.invert_yaxis()
    axes.set(xlabel="top-1 accuracy of a linear classifier on the student's frozen features (%)")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return figure

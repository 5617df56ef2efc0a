"""The tables made from the results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.results import atomic_path
from benchmarks.distillation.methods import METHODS

MEASURED = {
    "linear": "linear",
    "knn": "kNN",
    "few_labels": "10 labels",
    "noise": "noise",
    "blur": "blur",
    "contrast": "contrast",
    "photographs": "photographs",
}
Runs = Sequence[Mapping[str, Any]]


def read_results(folder: Path) -> dict[str, Runs]:
    """Reads the results of one teacher, student and length: method -> one a seed."""
    found = {
        method: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{method}-seed*"))]
        for method in METHODS
    }
    return {method: runs for method, runs in found.items() if runs}


def write_report(folder: Path) -> None:
    """Puts the tables into RESULTS.md, between its two marks.

    Args:
        folder: That of RESULTS.md and ``results``.
    """
    page = folder / "RESULTS.md"
    text = page.read_text() if page.exists() else "<!-- table -->\n<!-- end of table -->\n"
    before, mark, rest = text.partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    with atomic_path(page) as temporary:
        temporary.write_text(before + mark + "\n".join(_lines(folder / "results")) + "\n" + end + after)


def _lines(results: Path) -> Iterator[str]:
    for folder in sorted(results.glob("*/*-*"), key=_place):
        found = read_results(folder)
        if found:
            yield from _table(folder, found)
        yield from _selection(folder / "selection")


def _place(folder: Path) -> tuple[str, str, int]:
    student, _, epochs = folder.name.partition("-")
    return folder.parent.name, student, int(epochs)


def _table(folder: Path, found: Mapping[str, Runs]) -> Iterator[str]:
    """Yields the lines about students of one teacher, size and length, the best first."""
    first = next(iter(found.values()))[0]
    yield f"### {folder.parent.name}, {first['parameters']:,} parameters, {first['epochs']} epochs"
    yield ""
    yield (
        f"Each run: {first['student_passes']:,} images through the student; "
        f"{first['machine']['cpu']}, {first['machine']['threads']} thread(s), torch "
        f"{first['versions']['torch']}. Top-1 accuracy in %, mean ± standard deviation over seeds."
    )
    yield ""
    yield f"| method | seeds | {' | '.join(MEASURED.values())} | CPU (s) |"
    yield "| --- " * (len(MEASURED) + 3) + "|"
    order = sorted(found, key=lambda m: -statistics.mean(r["accuracy"]["linear"] for r in found[m]))
    for method in order:
        runs = found[method]
        cells = [_spread([run["accuracy"][name] for run in runs]) for name in MEASURED]
        seconds = statistics.mean(run["training_cpu_seconds"] for run in runs)
        seeds = ", ".join(str(run["seed"]) for run in runs)
        yield f"| {METHODS[method].label} | {seeds} | {' | '.join(cells)} | {seconds:.0f} |"
    yield ""


def _selection(folder: Path) -> Iterator[str]:
    """Yields the lines about the choice of options."""
    paths = [path for method in METHODS for path in sorted(folder.glob(f"{method}-[0-9].json"))]
    if not paths:
        return
    yield (
        f"Options for students of {folder.parents[1].name}, judged on held-out training images "
        f"({folder.parent.name.replace('-', ', ')} epochs):"
    )
    yield ""
    yield "| method | option | linear | kNN |"
    yield "| --- | --- | --- | --- |"
    for path in paths:
        run = json.loads(path.read_text())
        options = ", ".join(f"{name} = {value}" for name, value in run["options"].items())
        accuracy = run["accuracy"]
        yield (
            f"| {METHODS[run['method']].label} | {options} | {accuracy['linear']:.1f} | "
            f"{accuracy['knn']:.1f} |"
        )
    yield ""


def _spread(values: Sequence[float]) -> str:
    """Returns mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"

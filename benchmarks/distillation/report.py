"""The tables made from the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distillation.methods import METHODS
from benchmarks.harness import (
    device_of,
    load,
    seeds,
    spread,
    table,
    usual_device,
    write_between,
)

MEASURED = {
    "linear": "linear",
    "knn": "kNN",
    "few_labels": "10 labels",
    "noise": "noise",
    "blur": "blur",
    "contrast": "contrast",
    "photographs": "photographs",
}
# In the overview: what is compared with what, and in which measures.
COMPARED = (
    ("regression_dependence", "regression"),
    ("regression_dependence", "regression_rotated"),
    ("regression_dependence", "mimicry"),
    ("mimicry_dependence", "mimicry"),
    ("dependence_corrected", "regression"),
    *(("dependence_corrected", other) for other in ("cka", "similarity", "rkd", "published")),
    ("dependence_corrected", "dependence"),
    *((f"{other}_dependence", other) for other in ("cka", "similarity", "rkd")),
    *(
        (f"regression_dependence_{how}", "regression_dependence")
        for how in ("each_view", "anchors", "views")
    ),
    ("dependence_anchors", "dependence"),
)
OVERVIEW = ("linear", "knn", "few_labels")
Records = Sequence[Mapping[str, Any]]


def write_report(folder: Path) -> None:
    """Puts the tables into RESULTS.md, between its two marks.

    Args:
        folder: That of RESULTS.md and ``results``.
    """
    # With the learning rate of all, and with each method's own.
    groups: dict[str, dict[tuple[str, str, int], list[Any]]] = {"table": {}, "rates": {}}
    teachers = []
    for record in load(folder / "results"):
        told = record["settings"]
        if "student" not in told:
            accuracy = record["figures"]["accuracy"]
            # One that was trained twice has a record of each training.
            which = record["name"].rpartition("/teacher")[2].replace("-", " of ")
            teachers.append(
                f"{told['teacher']}{which}: linear {accuracy['linear']:.1f}, "
                f"kNN {accuracy['knn']:.1f}"
            )
            continue
        place = told["teacher"], told["student"], told["epochs"]
        mark = "rates" if "learning_rates" in told else "table"
        groups[mark].setdefault(place, []).append(record)
    parts = []
    if teachers:
        parts.append(f"Top-1 accuracy of the teachers' own features, in %: {'; '.join(teachers)}.")
    for mark, own in groups.items():
        overview = "\n\n".join(_overview(own)) or "Not run yet."
        write_between(folder / "RESULTS.md", f"{mark}, overview", overview)
        texts = [text for place in sorted(own) for text in _tables(place, own[place])]
        texts = parts + texts if mark == "table" else texts or ["Not run yet."]
        write_between(folder / "RESULTS.md", mark, "\n\n".join(texts))


def _overview(groups: Mapping[tuple[str, str, int], Records]) -> Iterator[str]:
    """Yields, for each teacher and student, what methods differ by: a row two methods.

    Differences are paired by seed, and bold where they are larger than they spread.
    """
    for teacher, student in sorted({place[:2] for place in groups}):
        found: dict[tuple[str, int], dict[int, Any]] = {}
        for place, records in groups.items():
            for record in records if place[:2] == (teacher, student) else ():
                if "held_out" not in record["settings"]:
                    own = found.setdefault((record["settings"]["method"], place[2]), {})
                    own[record["seed"]] = record["figures"]["accuracy"]
        lengths = sorted({epochs for _, epochs in found})
        rows = []
        for more, less in COMPARED:
            pairs = [(found.get((more, e), {}), found.get((less, e), {})) for e in lengths]
            if any(set(ours) & set(theirs) for ours, theirs in pairs):
                label = f"{METHODS[more].label}, less {METHODS[less].label}"
                cells = (_difference(*pair, name) for name in OVERVIEW for pair in pairs)
                rows.append([label, *cells])
        if rows:
            yield f"### Differences: {teacher}, {student}"
            heads = (f"{MEASURED[name]}, {epochs}" for name in OVERVIEW for epochs in lengths)
            yield table(["methods; epochs", *heads], rows)


def _difference(ours: Mapping[int, Any], theirs: Mapping[int, Any], name: str) -> str:
    """Returns the difference of an accuracy over the seeds that both have; bold beyond its spread.

    Examples:
        >>> ours, theirs = ({0: {"knn": x}, 1: {"knn": x + 0.5}} for x in (52.0, 50.5))
        >>> _difference(ours, theirs, "knn"), _difference(ours, {1: {"knn": 53.0}}, "knn")
        ('**+1.5 ± 0.0**', '-0.5')
    """
    differences = [
        ours[seed][name] - theirs[seed][name] for seed in sorted(set(ours) & set(theirs))
    ]
    text = spread(differences, sign="+")
    if len(differences) > 1 and abs(statistics.mean(differences)) > statistics.stdev(differences):
        return f"**{text}**"
    return text


def _tables(place: tuple[str, str, int], records: Records) -> Iterator[str]:
    """Yields the text about students of one teacher, size and length."""
    trials = [record for record in records if "held_out" in record["settings"]]
    students: dict[str, list[Any]] = {}
    for record in records:
        if "held_out" not in record["settings"]:
            students.setdefault(record["settings"]["method"], []).append(record)
    if students:
        yield from _students(place, students)
    if trials:
        yield f"#### Options for students of {place[0]}, {place[2]} epochs, on held-out training images"
        order = list(METHODS)
        trials = sorted(trials, key=lambda r: (order.index(r["settings"]["method"]), r["name"]))
        yield table(["method", "options", "linear", "kNN"], [_tried(r) for r in trials])


def _students(place: tuple[str, str, int], students: Mapping[str, Records]) -> Iterator[str]:
    """Yields a title, words and a table, the best method first."""
    every = [record for records in students.values() for record in records]
    usual = usual_device(every)
    first = next(record for record in every if device_of(record) == usual)
    figures = first["figures"]
    yield f"### {place[0]}, {figures['parameters']:,} parameters, {place[2]} epochs"
    yield (
        f"Each run: {figures['student_passes']:,} images through the student; "
        f"{usual}, torch {first['versions']['torch']}. "
        "Top-1 accuracy in %, mean ± standard deviation over seeds."
    )
    rows = []
    for method, records in students.items():
        accuracy = [record["figures"]["accuracy"] for record in records]
        cells = [spread([values[name] for values in accuracy]) for name in MEASURED]
        timed = [r["figures"]["training_cpu_seconds"] for r in records if device_of(r) == usual]
        seconds = f"{statistics.mean(timed):.0f}" if timed else ""
        rows.append([METHODS[method].label, seeds(records, usual), *cells, seconds])
    rows.sort(key=lambda row: -float(row[2].split()[0]))
    yield table(["method", "seeds", *MEASURED.values(), "CPU (s)"], rows)


def _tried(record: Mapping[str, Any]) -> list[str]:
    """Returns a row about one candidate."""
    told, accuracy = record["settings"], record["figures"]["accuracy"]
    options = ", ".join(f"{name} = {value}" for name, value in told["options"].items())
    if "learning_rates" in told:
        options += f", rate {told['learning_rate']:g}"
    numbers = [f"{accuracy[name]:.1f}" for name in ("linear", "knn")]
    return [METHODS[told["method"]].label, options, *numbers]

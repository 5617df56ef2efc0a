"""Tables and plots made from results, and where they stand on a page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.records import atomic_path, device_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, OTHERS = "#1f5fa8", "#9aa7b8"


def write_between(path: str | Path, mark: str, text: str) -> None:
    """Replaces what stands between ``<!-- mark -->`` and ``<!-- end of mark -->`` on a page.

    Args:
        path: The page; made if it is not there. If it has neither mark, both are added at its end.
        mark: Which part of the page.
        text: What shall stand there, Markdown.

    Raises:
        ValueError: If the page has one mark alone, one twice, or both in the wrong order.
    """
    path = Path(path)
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    page = path.read_text() if path.exists() else ""
    if begin not in page and end not in page:
        page = f"{page}\n{begin}\n{end}\n".lstrip()
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if page.count(begin) != 1 or page.count(end) != 1 or end in before:
        raise ValueError(f"{path.name} must have {begin!r} and then {end!r}, once each.")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table; columns of numbers are aligned to the right.

    Args:
        header: Titles of the columns.
        rows: Cells; None is an empty one, and a float has three digits: say others as text.

    Returns:
        Lines of Markdown.

    Raises:
        ValueError: If a row has not as many cells as the header.

    Examples:
        >>> print(table(["method", "kNN"], [["mvmr", 45.0], ["vicreg", "43.1 ± 0.2"]]))
        | method | kNN |
        | --- | ---: |
        | mvmr | 45 |
        | vicreg | 43.1 ± 0.2 |
    """
    cells = [[_cell(value) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"a row must have {len(header)} cells but is {row}.")
    rules = []
    for i in range(len(header)):
        column = [row[i] for row in cells if row[i]]
        numbers = column and all(cell.lstrip("+-<>= ")[:1].isdigit() for cell in column)
        rules.append("---:" if numbers else "---")
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rules, *cells])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Returns mean ± standard deviation as text; nothing of no values, no deviation of one.

    Examples:
        >>> spread([45.0, 46.0, 47.5]), spread([0.5], sign="+"), spread([])
        ('46.2 ± 1.3', '+0.5', '')
    """
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def usual_device(records: Iterable[Mapping[str, Any]]) -> str:
    """Returns the device that made most of the results."""
    return statistics.mode(map(device_of, records))


def seeds(records: Sequence[Mapping[str, Any]], usual: str) -> str:
    """Returns the seeds of results as text, with the device of those that were made on another.

    Args:
        records: Results.
        usual: The device that need not be said.

    Examples:
        >>> machines = [{"gpus": ["GPU"], "cpu": "CPU"}, {"gpus": [], "cpu": "CPU"}]
        >>> made = [{"seed": i, "machine": machines[i > 1]} for i in range(4)]
        >>> seeds(made, "GPU"), seeds(made, "CPU")
        ('0, 1; 2, 3 on CPU', '0, 1 on GPU; 2, 3')
    """
    groups: dict[str, list[str]] = {}
    for record in records:
        groups.setdefault(device_of(record), []).append(str(record["seed"]))
    return "; ".join(
        ", ".join(own) + ("" if device == usual else f" on {device}")
        for device, own in groups.items()
    )


def plot_points(
    path: str | Path,
    groups: Mapping[str, Sequence[float]],
    label: str,
    *,
    ours: Sequence[str] = (),
    goals: Mapping[str, float] | None = None,
    line: tuple[str, float] | None = None,
    log: bool = False,
) -> None:
    """Draws a row for each group: a point a value, and the mean as text.

    Args:
        path: The picture.
        groups: Name of the row -> values, one a seed or round.
        label: Of the values.
        ours: Rows that stand out.
        goals: Row -> a value that is marked by a bar.
        line: Words and value of a vertical line.
        log: Whether the scale is logarithmic.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.3 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(groups.items()):
        color = OURS if name in ours else OTHERS
        axes.plot(values, [place] * len(values), "o", color=color, ms=5, mfc="none")
        mean = statistics.mean(values)
        axes.plot(mean, place, "o", color=color, ms=5)
        axes.annotate(
            f"{mean:.3g}", (max(values), place), (6, 0), textcoords="offset points", va="center"
        )
        if goals and name in goals:
            axes.plot(goals[name], place, "|", color="black", ms=12, mew=1.5)
    if line is not None:
        axes.axvline(line[1], color="black", lw=0.8, ls=":")
        axes.annotate(
            f"{line[0]} {line[1]:.3g}",
            (line[1], 1),
            (3, -9),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    save_figure(path, figure)


def save_figure(path: str | Path, figure: Figure) -> None:
    """Writes a picture whole, at 110 dots an inch."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)

"""The tables and the plot made from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cache.accuracy import summarize
from benchmarks.harness import load, save_figure, spread, table, write_between

BASE = "no representations"


def write_report(folder: Path) -> None:
    """Writes the marked parts of RESULTS.md and its plot.

    Args:
        folder: Where RESULTS.md and ``results`` are.
    """
    page = folder / "RESULTS.md"
    figures = {}
    for name, section in {"steps": _steps, "store": _store, "values": _values}.items():
        for record in load(folder / "results", f"{name}.json"):
            figures[name] = record["figures"]
            write_between(page, name, f"{section(record['figures'])}\n\n{_where(record)}")
    accuracy = summarize(folder / "results")
    if accuracy:
        write_between(page, "accuracy", _accuracy(accuracy))
    if figures or accuracy:
        _plot(folder / "cache.png", figures, accuracy)


def _where(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    return (
        f"({machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"mvmr-loss {versions['mvmr_loss']}; `{record['command']}`)"
    )


def _steps(figures: dict[str, dict[str, float]]) -> str:
    rows = [
        [network, name, f"{1e3 * seconds:.2f}", f"{seconds / times[BASE]:.3f}"]
        for network, times in figures.items()
        for name, seconds in times.items()
    ]
    return table(["network", "representations", "milliseconds", "of the step without"], rows)


def _store(figures: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            f"{size} x {size}",
            f"{part['bytes_per_100k'] / 1e6:.0f}",
            f"{part['filled_per_second']:.0f}",
            f"{part['read_per_second']:.0f}",
        ]
        for size, part in figures.items()
    ]
    header = ["images", "MB per 100,000 images", "filled, images/s", "read, images/s"]
    return table(header, rows)


def _values(figures: dict[str, Any]) -> str:
    lines = ["The loss of one batch of photographs:", ""]
    for size, part in figures.items():
        exact = part["loss"]["exact"]
        lines.append(
            f"- {size} x {size}: exact {exact:.5f}; "
            + "; ".join(
                f"{name} {value:.5f} ({value - exact:+.5f})"
                for name, value in part["loss"].items()
                if name != "exact"
            )
        )
    rows = [
        [
            *(f"{size} x {size}", name, dim, f"{error:.2%}"),
            *(f"{part['dcor'][name][dim]:.5f}", f"{(2 * int(dim)) ** -0.5:.2%}"),
        ]
        for size, part in figures.items()
        for name, errors in part["distances"].items()
        for dim, error in errors.items()
    ]
    lines += [
        "",
        "Sketches of several widths: relative error of the distances (root mean square) and largest",
        "change of the distance correlation over four seeds. What is narrower than the sketch is",
        "stored as it is.",
        "",
        table(
            ["images", "representation", "width", "distances", "dCor", "bound of the distances"],
            rows,
        ),
    ]
    return "\n".join(lines)


def _accuracy(accuracy: dict[str, Any]) -> str:
    rows = []
    for name, part in accuracy.items():
        cells = []
        for probe in ("knn", "linear"):
            live = name == "live, exact"
            cells.append(spread(part[probe]["values"]))
            cells.append("" if live else spread(part[probe]["differences"], sign="+"))
        seeds = ", ".join(map(str, part["seeds"]))
        rows.append([name, seeds, *cells, f"{part['training_cpu_seconds']:.0f}"])
    header = ["representations", "seeds", "kNN", "to live", "linear", "to live"]
    return table([*header, "training, CPU s"], rows)


def _plot(path: Path, figures: dict[str, Any], accuracy: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, (network, times) in enumerate(figures.get("steps", {}).items()):
        names = [name for name in times if name not in (BASE, "reading alone")]
        places = [k + 0.38 * i for k in range(len(names))]
        bars = left.barh(places, [times[n] / times[BASE] for n in names], 0.36, label=network)
        left.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
        left.set_yticks([k + 0.19 for k in range(len(names))], [_wrapped(n) for n in names])
    if left.patches:
        left.axvline(1, color="black", lw=0.8)
        left.margins(x=0.15)
        left.legend(
            frameon=False, fontsize=8, ncols=2, bbox_to_anchor=(0.5, -0.13), loc="upper center"
        )
    left.set(title="Step time, of the step without", xlabel="ratio")
    part = figures.get("values", {}).get("96", {})
    for name, errors in part.get("distances", {}).items():
        dims = [int(dim) for dim in errors]
        middle.plot(dims, [100 * e for e in errors.values()], "o-", label=name, lw=1.3)
    if part:
        middle.plot(dims, [100 * (2 * d) ** -0.5 for d in dims], "k--", lw=1, label="bound")
        middle.set(xscale="log", yscale="log")
        middle.set_xticks(dims, [str(d) for d in dims])
        middle.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        middle.minorticks_off()
        middle.legend(frameon=False, fontsize=8)
    middle.set(title="Error of distances, 96 x 96", xlabel="width of the sketch", ylabel="% rms")
    for k, summary in enumerate(accuracy.values()):
        for probe, color in (("knn", "#7f9fc4"), ("linear", "#1f5fa8")):
            values = summary[probe]["values"]
            right.plot(values, [k] * len(values), "o", color=color, label=probe if k == 0 else None)
    if accuracy:
        right.set_yticks(range(len(accuracy)), [_wrapped(name) for name in accuracy])
        right.legend(
            frameon=False, fontsize=8, ncols=2, bbox_to_anchor=(0.5, -0.13), loc="upper center"
        )
    right.set(title="Accuracy, a point a seed", xlabel="top-1 (%)")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", zorder=0)
        axes.set_axisbelow(True)
    save_figure(path, figure)


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n")

"""The page and the plot made from the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.records import atomic_path

BASE = "no representations"
GOAL = 1.02


def write_report(folder: Path, results: dict[str, Any], accuracy: dict[str, Any]) -> None:
    """Writes RESULTS.md and its plot.

    Args:
        folder: Where to write.
        results: The content of the results file: part -> environment and ``result``.
        accuracy: As of :func:`benchmarks.cache.accuracy.summarize`.
    """
    lines = [
        "# Representations read from a store",
        "",
        "What it costs to read the four cacheable representations (pixels, scattering, HOG, local",
        "standard deviation) from a store of 1024-wide sketches in half precision, and what it",
        "changes. `augmented_pixels` is drawn anew each time, so it cannot be stored.",
        "Made by `python -m benchmarks.cache`.",
        "",
    ]
    sections = {"steps": _steps, "store": _store, "values": _values}
    for name, section in sections.items():
        if name in results:
            lines += section(results[name]["result"])
            lines += [_where(results[name]), ""]
    if accuracy:
        lines += _accuracy(accuracy)
    if results or accuracy:
        lines += ["![Times, errors and accuracies](cache.png)", ""]
        _plot(folder / "cache.png", results, accuracy)
    with atomic_path(folder / "RESULTS.md") as path:
        path.write_text("\n".join(lines))


def _where(part: dict[str, Any]) -> str:
    machine, versions = part["machine"], part["versions"]
    return (
        f"({machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"mvmr-loss {versions['mvmr_loss']}; `{part['command']}`)"
    )


def _steps(result: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "## A training step",
        "",
        "Medians of one run, interleaved: two forward passes, loss, backward and optimiser.",
        f"Goal: at most {GOAL} times the step without representations.",
        "",
        "| network | representations | milliseconds | of the step without |",
        "| --- | --- | --- | --- |",
    ]
    for network, times in result.items():
        for name, seconds in times.items():
            ratio = f"{seconds / times[BASE]:.3f}"
            lines.append(f"| {network} | {name} | {1e3 * seconds:.2f} | {ratio} |")
    return [*lines, ""]


def _store(result: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "## The store",
        "",
        "| images | MB per 100,000 images | filled, images/s | read, images/s |",
        "| --- | --- | --- | --- |",
    ]
    for size, part in result.items():
        lines.append(
            f"| {size} x {size} | {part['bytes_per_100k'] / 1e6:.0f} "
            f"| {part['filled_per_second']:.0f} | {part['read_per_second']:.0f} |"
        )
    return [*lines, ""]


def _values(result: dict[str, Any]) -> list[str]:
    lines = ["## The numbers", "", "The loss of one batch of photographs:", ""]
    for size, part in result.items():
        exact = part["loss"]["exact"]
        lines.append(
            f"- {size} x {size}: exact {exact:.5f}; "
            + "; ".join(
                f"{name} {value:.5f} ({value - exact:+.5f})"
                for name, value in part["loss"].items()
                if name != "exact"
            )
        )
    lines += [
        "",
        "Sketches of several widths: relative error of the distances (root mean square) and largest",
        "change of the distance correlation over four seeds. What is narrower than the sketch is",
        "stored as it is.",
        "",
        "| images | representation | width | distances | dCor | bound of the distances |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size, part in result.items():
        for name, errors in part["distances"].items():
            for dim, error in errors.items():
                change = part["dcor"][name][dim]
                bound = (2 * int(dim)) ** -0.5
                lines.append(
                    f"| {size} x {size} | {name} | {dim} | {error:.2%} | {change:.5f} "
                    f"| {bound:.2%} |"
                )
    return [*lines, ""]


def _accuracy(accuracy: dict[str, Any]) -> list[str]:
    lines = [
        "## Accuracy",
        "",
        "The small ResNet trained by itself for a few epochs, then frozen. With one seed, weights,",
        "order and augmentation are the same in each row. Each run's settings are in its file in",
        "`results/accuracy`. Top-1 in %, mean ± standard deviation over seeds; beside it the mean",
        "difference to the live run of the same seed.",
        "",
        "| representations | seeds | kNN | to live | linear | to live | training, CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, part in accuracy.items():
        cells = []
        for probe in ("knn", "linear"):
            cells.append(_spread(part[probe]["values"], ""))
            cells.append(_spread(part[probe]["differences"], "+") if name != "live, exact" else "")
        seeds = ", ".join(map(str, part["seeds"]))
        seconds = f"{part['training_cpu_seconds']:.0f}"
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} | {seconds} |")
    return [*lines, ""]


def _spread(values: Sequence[float], sign: str) -> str:
    """Returns a mean and a standard deviation as text, empty where there are no values."""
    if not values:
        return ""
    text = f"{statistics.mean(values):{sign}.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def _plot(path: Path, results: dict[str, Any], accuracy: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for i, (network, times) in enumerate(results.get("steps", {}).get("result", {}).items()):
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
    part = results.get("values", {}).get("result", {}).get("96", {})
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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n")

"""Tables and plots of the results, written into RESULTS.md: ``python -m benchmarks.quality.report``."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    device_of,
    load,
    ratio,
    save_figure,
    seeds,
    spread,
    table,
    usual_device,
    write_between,
)
from benchmarks.quality.cost import TERMS
from benchmarks.quality.plan import (
    LEANER,
    LEARNING_RATES,
    METHODS,
    ON_TOP,
    ON_TOP_FACTORS,
    PLANS,
    file_name,
    tries,
)

HERE = Path(__file__).parent
# Plan -> what its rows are compared with; on top of other methods, each with its own.
BASELINES = {
    **dict.fromkeys(("main", "long", "little", "photographs", "resnet18", "vit"), "simclr-crops"),
    **dict.fromkeys(("ablation", "shapes"), "recommended"),
    "on_top": "the-method",
}
MORE = {"few_labels": "10 labels", "noise": "noise", "blur": "blur", "contrast": "contrast"}
Records = list[dict[str, Any]]
Rows = dict[str, Records]


def rows_of(records: Sequence[dict[str, Any]]) -> dict[int, Rows]:
    """Returns the results of a plan: epochs -> row -> results by seed, the best row first."""
    found: dict[int, Rows] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        row, _, rest = record["name"].partition("/")[2].partition("-epochs")
        epochs = int(rest.partition("-")[0])
        found.setdefault(epochs, {}).setdefault(row, []).append(record)
    return {
        epochs: dict(sorted(rows.items(), key=lambda item: -mean(item[1], "linear")))
        for epochs, rows in sorted(found.items())
    }


def values(records: Records, name: str) -> list[float]:
    """Returns a figure of each result that has it."""
    return [record["figures"][name] for record in records if name in record["figures"]]


def mean(records: Records, name: str) -> float:
    """Returns the mean of a figure over results."""
    return statistics.mean(values(records, name))


def compared_with(plan: str, row: str) -> str:
    """Returns the row of a plan that another one is compared with.

    Examples:
        >>> compared_with("main", "vicreg")
        'simclr-crops'
        >>> compared_with("little", "vicreg-100-images-a-class")
        'simclr-crops-100-images-a-class'
        >>> compared_with("on_top", "byol-and-features")
        'byol'
    """
    if plan == "on_top":
        return row.partition("-and-")[0]
    if plan == "little":
        return re.sub(r"^.*?(?=-\d+-images)", BASELINES[plan], row)
    return BASELINES[plan]


def accuracy_table(rows: Rows, plan: str) -> str:
    """Returns accuracies, ranks and time of each row; differences are paired by seed.

    Times are those on the device that made most results of the table.

    Args:
        rows: Of one length, as of :func:`rows_of`.
        plan: Whose they are.
    """
    linear = {row: {r["seed"]: r["figures"]["linear"] for r in own} for row, own in rows.items()}
    usual = usual_device(chain(*rows.values()))
    lines = []
    for row, own in rows.items():
        timed = values([r for r in own if device_of(r) == usual], "seconds_per_epoch")
        other = compared_with(plan, row)
        both = sorted(set(linear[row]) & set(linear.get(other, {})))
        paired = [linear[row][seed] - linear[other][seed] for seed in both]
        lines.append(
            [
                row.replace("-", " "),
                spread(values(own, "linear")),
                spread(values(own, "knn")),
                "" if row == other or not paired else spread(paired, sign="+"),
                f"{mean(own, 'rank_of_features'):.0f}",
                f"{statistics.mean(timed):.2f}" if timed else "",
                seeds(own, usual),
            ]
        )
    less = f"linear less {BASELINES[plan].replace('-', ' ')}'s"
    return table(["row", "linear", "kNN", less, "rank", "s / epoch", "seeds"], lines)


def more_table(rows: Rows) -> str | None:
    """Returns the accuracies with few labels and on damaged images, of rows that have them."""
    lines = [
        [row.replace("-", " "), *(spread(values(own, name)) for name in MORE)]
        for row, own in rows.items()
        if values(own, "few_labels")
    ]
    return table(["row", *MORE.values()], lines) if lines else None


def selection_table(records: Sequence[dict[str, Any]]) -> str:
    """Returns the linear accuracy of each try: a line a set of options, a column a learning rate."""
    linear = {record["name"]: record["figures"]["linear"] for record in records}
    lines = []
    for method in METHODS:
        all_tries = tries(method)
        for first in range(0, len(all_tries), len(LEARNING_RATES)):
            told = all_tries[first]
            options = [f"{name} = {value}" for name, value in told["options"].items()]
            if told["representations"]:
                options.append("with " + ", ".join(told["representations"]))
            cells = [
                linear.get(f"selection/{method}-{first + i}") for i in range(len(LEARNING_RATES))
            ]
            lines.append(
                [method, "; ".join(options), *("" if c is None else f"{c:.1f}" for c in cells)]
            )
    return table(["method", "options", *(f"rate {rate}" for rate in LEARNING_RATES)], lines)


def on_top_table(records: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """Returns the accuracies of what is tried on top of each method, on held-out images.

    Args:
        records: Of the plan.
        columns: Head of each column -> the names of its runs, with ``{method}`` for the method.
    """
    found = {record["name"]: record["figures"] for record in records}
    lines = []
    for method in ON_TOP:
        tried = [found.get(name.format(method=method)) for name in columns.values()]
        cells = ["" if f is None else f"{f['linear']:.1f} / {f['knn']:.1f}" for f in tried]
        lines.append([method, *cells])
    return table(["method", *columns], lines)


def cost_table(records: Sequence[dict[str, Any]]) -> str:
    """Returns by how much the terms on the features lengthen a step of each method."""
    lines = []
    for record in records:
        told, machine = record["settings"], record["machine"]
        where = device_of(record) + ("" if machine["gpus"] else f", {machine['threads']} threads")
        for method, times in record["figures"]["times"].items():
            alone = f"{1000 * statistics.median(times['alone']):.0f}"
            for terms in TERMS:
                cells = [method, terms, told["encoder"], str(told["batch_size"]), where, alone]
                for name in (f"and {terms}", "alone again", terms):
                    found = ratio(times[name], times["alone"])
                    cells.append(f"{found.value:.3f} ± {found.spread:.3f}")
                lines.append(cells)
    heads = ["method", "terms", "encoder", "batch", "machine", "alone (ms)", "with, over alone"]
    return table([*heads, "alone again, over alone", "the terms, over alone"], lines)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _band(
    axes: Any, epochs: Sequence[int], curves: Sequence[Sequence[float]], style: str, label: str
) -> None:
    """Draws the mean of curves, and a band from the least to the greatest of them."""
    ends = list(zip(*curves, strict=True))
    (line,) = axes.plot(epochs, [statistics.mean(e) for e in ends], style, label=label, lw=1.5)
    low, high = zip(*[(min(e), max(e)) for e in ends], strict=True)
    axes.fill_between(epochs, low, high, alpha=0.15, color=line.get_color())


def plot_curves(
    rows: Mapping[str, Records],
    path: Path,
    label: str,
    value: Callable[[dict[str, Any]], float],
) -> None:
    """Draws a figure over training: a line a row, a band from least to greatest over seeds.

    Args:
        rows: Of one length.
        path: Where the picture goes.
        label: Of the axis.
        value: From a point of a result's curve to the figure.
    """
    figure, axes = _axes()
    for i, (row, own) in enumerate(rows.items()):
        epochs = [point["epoch"] for point in own[0]["figures"]["curve"]]
        curves = [[value(p) for p in record["figures"]["curve"]] for record in own]
        _band(axes, epochs, curves, "-" if i < 10 else "--", row.replace("-", " "))
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    # Beside the axes, where it hides no line.
    figure.legend(loc="outside right upper", fontsize=8)
    save_figure(path, figure)


def plot_terms(own: Records, path: Path) -> None:
    """Draws how much a row's features depend on each representation over training.

    Args:
        own: Its results.
        path: Where the picture goes.
    """
    names = [n for n in own[0]["figures"]["terms"] if n.startswith("dependence/")]
    figure, axes = _axes()
    epochs = [point["epoch"] for point in own[0]["figures"]["curve"]]
    for name in names:
        curves = [[1 - p["terms"][name] for p in r["figures"]["curve"]] for r in own]
        _band(axes, epochs, curves, "-", name.split("/")[1])
    axes.set_xlabel("epoch")
    axes.set_ylabel("distance correlation with the features")
    axes.legend()
    save_figure(path, figure)


def plot_effects(rows: Rows, baseline: str, path: Path) -> None:
    """Draws each row's difference from a row, paired by seed, with the standard deviation."""
    base = {record["seed"]: record["figures"]["linear"] for record in rows[baseline]}
    figure, axes = _axes()
    figure.set_size_inches(7, 0.28 * len(rows) + 1)
    effects = {
        row: [r["figures"]["linear"] - base[r["seed"]] for r in own if r["seed"] in base]
        for row, own in rows.items()
        if row != baseline
    }
    effects = {row: found for row, found in effects.items() if found}
    for i, found in enumerate(reversed(effects.values())):
        error = statistics.stdev(found) if len(found) > 1 else 0.0
        axes.barh(i, statistics.mean(found), xerr=error, color="C0", alpha=0.7)
    axes.set_yticks(range(len(effects)), [row.replace("-", " ") for row in reversed(effects)])
    axes.set_xlabel(f"linear accuracy less that of what is {baseline}, in points")
    save_figure(path, figure)


def _parts(name: str, records: Records, page: Path) -> list[str]:
    """Returns the parts of a plan's text, and draws its pictures beside the page."""
    if name == "selection":
        return [selection_table(records)] if records else []
    if name == "on_top_selection":
        runs = {f"{f:g} times": f"{name}/{{method}}-{i}" for i, f in enumerate(ON_TOP_FACTORS)}
        return [on_top_table(records, runs)] if records else []
    if name == "on_top_leaner":
        runs = {x: f"{name}/{{method}}-and-{file_name(x)}-epochs10-seed0" for x in LEANER}
        return [on_top_table(records, runs)] if records else []
    parts = []
    for epochs, rows in rows_of(records).items():
        parts += [
            f"{epochs} epochs, {usual_device(chain(*rows.values()))}:",
            accuracy_table(rows, name),
        ]
        more = more_table(rows)
        parts += ["Few labels, and damaged test images (linear):", more] if more else []
        curves = all(len(own[0]["figures"]["curve"]) > 1 for own in rows.values())
        if curves:
            drawn = page.with_name(f"{name}_{epochs}.png")
            plot_curves(rows, drawn, "linear accuracy in %", lambda point: point["linear"])
            ranks = page.with_name(f"{name}_{epochs}_rank.png")
            plot_curves(
                rows, ranks, "effective rank of features", lambda point: point["rank_of_features"]
            )
            parts += [f"![Linear accuracy over training]({drawn.name})"]
            parts += [f"![Effective rank over training]({ranks.name})"]
            if "recommended-crops" in rows:
                terms = page.with_name(f"{name}_{epochs}_dependence.png")
                plot_terms(rows["recommended-crops"], terms)
                parts += [f"![Dependence on each representation over training]({terms.name})"]
        elif name == "ablation" and BASELINES[name] in rows and len(rows) > 1:
            drawn = page.with_name(f"{name}_{epochs}.png")
            plot_effects(rows, BASELINES[name], drawn)
            parts += [f"![Difference of each row]({drawn.name})"]
    return parts


def main(folder: Path = HERE / "results", page: Path = HERE / "RESULTS.md") -> None:
    """Writes what there are results of.

    Args:
        folder: Of the results.
        page: Where the tables stand.
    """
    for name in PLANS:
        records = load(folder / name)
        parts = _parts(name, records, page)
        write_between(page, name, "\n\n".join(parts) or "Not run yet.")
    costs = load(folder / "cost")
    write_between(page, "cost", cost_table(costs) if costs else "Not run yet.")


if __name__ == "__main__":
    main()

"""The report of a run, and the comparison of many: HTML and Markdown with pictures."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.records import atomic_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

EMBEDDED_IMAGES = 1000
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A400")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "font.size": 10,
    "savefig.dpi": 130,
}
EVALUATIONS = {
    "knn": "weighted kNN",
    "linear": "linear probe",
    "linear_ten_crop": "linear probe, ten crops",
}


def colors(count: int) -> list[Any]:
    """Returns as many colours as there are series, no two the same.

    Examples:
        >>> len(set(colors(8))), len(set(colors(20)))
        (8, 20)
    """
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [tuple(color) for color in plt.get_cmap("turbo")(np.linspace(0.04, 0.96, count))]


def evaluation_rows(accuracy: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Returns the title and the accuracies of each evaluation of a run.

    Args:
        accuracy: The "accuracy" of a run's results.

    Returns:
        Pairs of title and ``{"top1": ..., ...}``.

    Examples:
        >>> evaluation_rows({"knn": {"top1": 50.0, "top5": 90.0}})
        [('weighted kNN', {'top1': 50.0, 'top5': 90.0})]
    """
    rows: list[tuple[str, Mapping[str, float]]] = []
    for key, value in accuracy.items():
        if not key.startswith("labels_"):
            rows.append((EVALUATIONS.get(key, key), value))
            continue
        part = key.removeprefix("labels_")
        title = "folds of the labels" if part == "folds" else f"{float(part):.3g} of the labels"
        rows.append((f"linear probe, {title}", value["linear"]))
        rows.append((f"fine-tuned, {title}", value["finetune"]))
    return rows


def write_report(
    folder: Path,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    features: Tensor,
    labels: Tensor,
) -> None:
    """Writes ``report.html`` and its pictures ``curves.png`` and ``embedding.png``.

    Args:
        folder: The run's folder.
        results: What is in ``results.json``.
        rows: The metrics of each epoch.
        features: Features of the test images, shape (N, D).
        labels: Their labels, shape (N,).
    """
    _save(folder / "curves.png", lambda: _curves(rows, results["label"]))
    _save(
        folder / "embedding.png",
        lambda: _embedding(features, labels, results["classes"], results["settings"]["seed"]),
    )
    pretraining, environment = results["pretraining"], results["environment"]
    s = results["settings"]
    facts = {
        "method": results["label"],
        "data": f"{s['data']}, {s['image_size']} pixels, {pretraining['images']:,} images for "
        "pretraining",
        "backbone": f"{s['backbone']}: {results['backbone']['parameters']:,} parameters, "
        f"{results['backbone']['flops_per_image'] / 1e9:.3g} GFLOP an image",
        "epochs": f"{pretraining['epochs']:g} of {s['epochs']}",
        "time of pretraining": f"{pretraining['seconds'] / 60:.1f} min, "
        f"{pretraining['step_seconds']:.3g} s a step, "
        f"{pretraining['images_per_second']:.4g} images/s",
        "peak memory": f"{pretraining['peak_memory_mb']:,.0f} MiB",
        "machine": ", ".join(f"{k}: {v}" for k, v in environment["machine"].items() if v),
        "versions": ", ".join(f"{k} {v}" for k, v in environment["versions"].items()),
        "seed": environment["seed"],
        "command": environment["command"],
    }
    accuracies = [
        (title, f"{value['top1']:.2f}" + _spread(value), f"{value['top5']:.2f}")
        for title, value in evaluation_rows(results["accuracy"])
    ]
    shown = min(EMBEDDED_IMAGES, len(labels))
    body = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(results["label"])}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd;
  vertical-align: top }}
img {{ max-width: 100% }} details {{ margin: 1rem 0 }}
</style>
<h1>{html.escape(results["label"])}</h1>
<h2>Accuracy on the test images, in percent</h2>
{_html_table(("evaluation", "top-1", "top-5"), accuracies)}
<h2>Pretraining</h2>
<img src="curves.png" alt="Curves of each loss term, accuracy, learning rate and speed by epoch">
<h2>Features of {shown} test images, in two dimensions (t-SNE)</h2>
<img src="embedding.png" alt="Features of test images in two dimensions, one colour a class">
<h2>Run</h2>
{_html_table(("", ""), facts.items())}
<details><summary>All settings</summary>{_html_table(("setting", "value"), s.items())}</details>
</html>
"""
    with atomic_path(folder / "report.html") as path:
        path.write_text(body)


def write_comparison(folder: Path, runs: Mapping[str, tuple[Mapping[str, Any], list[Any]]]) -> str:
    """Writes ``comparison.md``, a table of many runs, and ``comparison.png``, a plot.

    Args:
        folder: Where to write; created.
        runs: Name -> results of the run and its metrics by epoch; not empty.

    Returns:
        The Markdown table.
    """
    titles = list(
        dict.fromkeys(
            title
            for results, _ in runs.values()
            for title, _ in evaluation_rows(results["accuracy"])
        )
    )
    columns = [*titles, "top-5, ten crops", "step (s)", "images/s", "memory (MiB)"]
    lines = [" | ".join(["| run", *columns]) + " |", "| --- " + "| ---: " * len(columns) + "|"]
    for name, (results, _) in runs.items():
        values = dict(evaluation_rows(results["accuracy"]))
        cells = [
            f"{values[title]['top1']:.2f}" + _spread(values[title]) if title in values else ""
            for title in titles
        ]
        top5 = results["accuracy"].get("linear_ten_crop", {}).get("top5")
        pretraining = results["pretraining"]
        cells += [
            "" if top5 is None else f"{top5:.2f}",
            f"{pretraining['step_seconds']:.3g}",
            f"{pretraining['images_per_second']:.4g}",
            f"{pretraining['peak_memory_mb']:.0f}",
        ]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    table = "\n".join(lines)
    differing = differing_settings([results["settings"] for results, _ in runs.values()])
    note = (
        f"These runs differ in: {', '.join(differing)}."
        if differing
        else "These runs have the same settings."
    )
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "comparison.png", lambda: _comparison(runs, titles))
    with atomic_path(folder / "comparison.md") as path:
        path.write_text(
            f"Accuracies are top-1 in percent, unless a column says otherwise. {note}\n\n{table}\n\n"
            "![Accuracies, and kNN accuracy by epoch](comparison.png)\n"
        )
    return table


def differing_settings(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the settings that are not the same in all runs.

    Args:
        settings: Of each run.

    Returns:
        Names.

    Examples:
        >>> differing_settings([{"method": "mvmr", "seed": 0}, {"method": "byol", "seed": 0}])
        ['method']
    """
    names = dict.fromkeys(name for s in settings for name in s)
    return [name for name in names if any(s.get(name) != settings[0].get(name) for s in settings)]


def _spread(value: Mapping[str, float]) -> str:
    """Returns the standard deviation over several subsets, if there is one."""
    return f" ± {value['top1_std']:.2f}" if "top1_std" in value else ""


def _html_table(header: Sequence[str], rows: Any) -> str:
    """Returns an HTML table."""
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    lines = [f"<tr>{cells}</tr>"] if any(header) else []
    lines += [
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return "<table>" + "\n".join(lines) + "</table>"


def _save(path: Path, draw: Callable[[], Figure]) -> None:
    """Draws a figure and writes it atomically."""
    with plt.rc_context(STYLE):
        figure = draw()
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
        plt.close(figure)


def _curves(rows: Sequence[Mapping[str, float]], label: str) -> Figure:
    """Draws loss, its terms, accuracy, learning rate and speed over epochs."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    figure.suptitle(label)

    def draw(axis: Axes, names: Sequence[str], title: str, labels: Sequence[str] = ()) -> None:
        for name, shown, color in zip(names, labels or names, colors(len(names)), strict=True):
            points = [(row["epoch"], row[name]) for row in rows if name in row]
            axis.plot(
                *zip(*points, strict=True),
                marker="o" if len(points) <= 30 else None,
                markersize=3.5,
                color=color,
                label=shown,
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)

    terms = [name for name in rows[0] if name.startswith("loss_")]
    names = [name.removeprefix("loss_").replace("_", " ") for name in terms]
    if len(terms) > 1:
        names = ["sum", *names]
        terms = ["loss", *terms]
    draw(axes[0, 0], terms, "loss terms, weighted (mean over the epoch)", names)
    values = [row[name] for row in rows for name in terms]
    if min(values) > 0 and max(values) > 8 * min(values):
        axes[0, 0].set_yscale("log")
        axes[0, 0].set_title(
            axes[0, 0].get_title(loc="left") + ", log scale", fontsize=10, loc="left"
        )
    axes[0, 0].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    monitored = any("train_knn_top1" in row for row in rows)
    if monitored:
        draw(axes[0, 1], ["train_knn_top1"], "kNN accuracy on held-out training images, %")
    else:
        axes[0, 1].set_axis_off()
    draw(axes[1, 0], ["learning_rate"], "learning rate at the end of the epoch")
    draw(axes[1, 1], ["images_per_second"], "images a second")
    axes[1, 1].set_ylim(bottom=0)
    return figure


def _embedding(features: Tensor, labels: Tensor, classes: Sequence[str], seed: int) -> Figure:
    """Draws the features of some test images in two dimensions."""
    from sklearn.manifold import TSNE

    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(features), generator=draw)[:EMBEDDED_IMAGES]
    x = torch.nn.functional.normalize(features[chosen], dim=1).numpy()
    perplexity = min(30.0, max(1.0, (len(x) - 1) / 3))
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    figure, axis = plt.subplots(figsize=(8, 6.2), layout="constrained")
    palette = plt.get_cmap("tab10" if len(classes) <= 10 else "turbo")
    shown = labels[chosen].numpy()
    for label in np.unique(shown):
        place = label if len(classes) <= 10 else label / max(1, len(classes) - 1)
        axis.scatter(
            *points[shown == label].T,
            s=14,
            color=palette(place),
            alpha=0.8,
            linewidths=0,
            label=classes[label],
        )
    if len(classes) <= 30:
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    axis.set(xticks=[], yticks=[], title=f"t-SNE of {len(x)} test images' features")
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    return figure


def _comparison(
    runs: Mapping[str, tuple[Mapping[str, Any], list[Any]]], titles: Sequence[str]
) -> Figure:
    """Draws the accuracies of many runs, and their kNN accuracy over epochs."""
    height = max(3.6, 0.42 * len(titles) * (1 + 0.22 * len(runs)) + 1.4)
    figure, (bars, curves) = plt.subplots(
        1, 2, figsize=(12, height), layout="constrained", width_ratios=(1.15, 1)
    )
    thickness = 0.84 / len(runs)
    series = zip(runs.items(), colors(len(runs)), strict=True)
    for i, ((name, (results, rows)), color) in enumerate(series):
        values = dict(evaluation_rows(results["accuracy"]))
        at = [j for j, title in enumerate(titles) if title in values]
        top1 = [values[titles[j]]["top1"] for j in at]
        drawn = bars.barh(
            [j + (i - (len(runs) - 1) / 2) * thickness for j in at],
            top1,
            thickness * 0.92,
            color=color,
            label=name,
        )
        bars.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
        points = [(r["epoch"], r["train_knn_top1"]) for r in rows if "train_knn_top1" in r]
        if points:
            curves.plot(
                *zip(*points, strict=True), color=color, marker="o", markersize=3.5, label=name
            )
    bars.set_yticks(range(len(titles)), titles)
    bars.invert_yaxis()
    bars.grid(visible=False, axis="y")
    bars.set_xlabel("top-1 on the test images, %")
    bars.set_xlim(0, min(108, 1.12 * max(bars.get_xlim()[1], 1)))
    curves.set_xlabel("epoch")
    curves.set_title("kNN accuracy on held-out training images, %", fontsize=10, loc="left")
    if curves.lines:
        curves.xaxis.get_major_locator().set_params(integer=True)
    else:
        curves.set_axis_off()
    handles, names = bars.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False
    )
    return figure

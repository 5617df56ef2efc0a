"""The report of a run and the comparison of many: Markdown with pictures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.harness import save_figure, table, write_between

EMBEDDED_IMAGES = 1000
# As Lightning's throughput monitor logs it.
SPEED = "train/device/samples_per_sec"
EVALUATIONS = {
    "knn": "weighted kNN",
    "linear": "linear",
    "linear_ten_crop": "linear, ten crops",
}


def metrics(folder: Path) -> list[dict[str, float]]:
    """Reads what Lightning's CSVLogger wrote of a run, over all of its processes.

    Args:
        folder: The run's folder.

    Returns:
        One mapping a logged step, in their order, without empty cells. Of a step that was made again
        after a stop, the last one counts.
    """
    files = sorted(
        folder.glob("metrics/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:])
    )
    steps: dict[int, dict[str, float]] = {}
    for path in files:
        with path.open(newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        if rows:
            first = rows[0]["step"]
            steps = {step: row for step, row in steps.items() if step < first}
        for row in rows:
            steps.setdefault(int(row["step"]), {}).update(row)
    return [steps[step] for step in sorted(steps)]


def evaluation_rows(accuracy: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Returns the title and the accuracies of each evaluation of a run.

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
        rows += [(f"linear, {title}", value["linear"]), (f"fine-tuned, {title}", value["finetune"])]
    return rows


def write_report(folder: Path, result: Mapping[str, Any], features: Tensor, labels: Tensor) -> None:
    """Writes ``report.md`` with ``curves.png`` and ``embedding.png``.

    Args:
        folder: The run's folder.
        result: The record of the run.
        features: Features of the test images, shape (N, D).
        labels: Their labels, shape (N,).
    """
    found = result["figures"]
    _curves(folder / "curves.png", metrics(folder))
    shown = _embedding(folder / "embedding.png", features, labels, found["classes"])
    accuracies = [
        [title, _top1(value), f"{value['top5']:.2f}"]
        for title, value in evaluation_rows(found["accuracy"])
    ]
    facts = {
        **{k: v for k, v in found["pretraining"].items() if v is not None},
        **{f"backbone: {k}": f"{v:,}" for k, v in found["backbone"].items()},
        **{k: v for k, v in result["machine"].items() if v},
        **result["versions"],
        "command": result["command"],
        "seed": result["seed"],
    }
    text = "\n\n".join(
        [
            f"# {found['label']}",
            "Accuracy on the test images, in percent.",
            table(["evaluation", "top-1", "top-5"], accuracies),
            "![Terms of the loss, learning rate, speed and accuracy by step](curves.png)",
            f"![Features of {shown} test images in two dimensions, by t-SNE](embedding.png)",
            table(
                ["run", ""],
                [[k, f"{v:.5g}" if isinstance(v, float) else v] for k, v in facts.items()],
            ),
            table(["setting", ""], [[k, str(v)] for k, v in result["settings"].items()]),
        ]
    )
    write_between(folder / "report.md", "report", text)


def write_comparison(page: Path, runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes a table of many runs between marks of a page, and a plot of them beside it.

    Args:
        page: The page; made if there is none.
        runs: Name -> record of the run.

    Returns:
        The Markdown table.
    """
    rows = {name: dict(evaluation_rows(r["figures"]["accuracy"])) for name, r in runs.items()}
    titles = list(dict.fromkeys(title for values in rows.values() for title in values))
    cells = []
    for name, values in rows.items():
        found = runs[name]["figures"]
        top5 = found["accuracy"].get("linear_ten_crop", {}).get("top5")
        rate = found["pretraining"]["images_per_second"]
        cells.append(
            [name]
            + [_top1(values[title]) if title in values else "" for title in titles]
            + [f"{value:.2f}" if value is not None else "" for value in (top5, rate)]
        )
    text = table(["run", *titles, "top-5, ten crops", "images/s"], cells)
    settings = [run["settings"] for run in runs.values()]
    names = dict.fromkeys(k for s in settings for k in s)
    differ = [k for k in names if len({str(s.get(k)) for s in settings}) > 1]
    note = f"differ in: {', '.join(differ)}" if differ else "have the same settings"
    picture = page.with_name("comparison.png")
    _comparison(picture, titles, rows)
    write_between(
        page,
        "comparison",
        f"Accuracies are top-1 in percent, unless a column says otherwise. These runs {note}.\n\n"
        f"{text}\n\n"
        f"![Accuracies]({picture.name})",
    )
    return text


def _top1(value: Mapping[str, float]) -> str:
    return f"{value['top1']:.2f}" + (f" ± {value['top1_std']:.2f}" if "top1_std" in value else "")


def _curves(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draws every logged number by step: a panel for losses, accuracies, learning rate and speed."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row} - {"epoch", "step"})
    panels: dict[str, list[str]] = {"loss": [], "accuracy": [], "learning rate": [], "images/s": []}
    for name in names:
        if "top1" in name:
            panels["accuracy"].append(name)
        elif name.startswith("lr-"):
            panels["learning rate"].append(name)
        elif name == SPEED:
            panels["images/s"].append(name)
        elif name.startswith("train_") and "_cls_" not in name:
            panels["loss"].append(name)
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (title, chosen) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in chosen:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), ".-", label=name.removeprefix("train_"), lw=1)
        axes.set(title=title, xlabel="step")
        axes.grid(color="0.9")
        if chosen:
            axes.legend(fontsize=7, frameon=False)
    save_figure(path, figure)


def _embedding(path: Path, features: Tensor, labels: Tensor, classes: Sequence[str]) -> int:
    """Draws test images by t-SNE of their features; returns how many."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    kept = slice(None, None, -(-len(labels) // EMBEDDED_IMAGES))
    features, labels = features[kept], labels[kept]
    perplexity = min(30, max(2, len(labels) // 4))
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features.numpy())
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    for label, name in enumerate(classes):
        x, y = places[labels.numpy() == label].T
        axes.plot(x, y, ".", ms=4, label=name)
    axes.legend(fontsize=7, bbox_to_anchor=(1, 1), frameon=False)
    axes.set(xticks=[], yticks=[])
    save_figure(path, figure)
    return len(labels)


def _comparison(path: Path, titles: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws the top-1 accuracy of each run, a panel an evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(titles), 1.2 + 0.3 * len(rows)), layout="constrained")
    for axes, title in zip(
        figure.subplots(1, len(titles), squeeze=False).flat, titles, strict=True
    ):
        values = [row[title]["top1"] if title in row else 0.0 for row in rows.values()]
        axes.bar_label(axes.barh(list(rows), values, color="#1f5fa8"), fmt="%.1f", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, max(statistics.fmean([100, max(values)]), 1))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[1:]:
        axes.set_yticklabels([])
    save_figure(path, figure)

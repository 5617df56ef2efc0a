"""Tables and plots of the results, written into RESULTS.md: ``python -m benchmarks.quality.report``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import load, save_figure, spread, table, write_between
from benchmarks.quality.plan import TABLES, file_name

HERE = Path(__file__).parent
# Table -> the row that the others are compared with; a row "NAME and ..." with row NAME.
BASELINES = {"main": "vicreg", "ablation": "recommended"}


def rows_of(
    name: str, records: Sequence[dict[str, Any]], epochs: int
) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of each row of a table, of one length of training, by seed.

    Args:
        name: The table, a key of ``TABLES``.
        records: All results of the table.
        epochs: The length.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in TABLES[name]:
        prefix = f"{name}/{file_name(row)}-epochs{epochs}-seed"
        own = [record for record in records if record["name"].startswith(prefix)]
        if own:
            found[row] = sorted(own, key=lambda record: record["seed"])
    return found


def accuracy_table(rows: dict[str, list[dict[str, Any]]], baseline: str | None) -> str:
    """Returns accuracies, ranks and time of each row; differences are paired by seed.

    Args:
        rows: As of :func:`rows_of`.
        baseline: The row that the others are compared with; None: "NAME and ..." with NAME.
    """
    linear = {
        row: {record["seed"]: record["figures"]["linear"] for record in own}
        for row, own in rows.items()
    }
    lines = []
    for row, own in rows.items():
        figures = [record["figures"] for record in own]
        other = baseline or row.partition(" and ")[0]
        both = sorted(set(linear[row]) & set(linear.get(other, {})))
        paired = [linear[row][seed] - linear[other][seed] for seed in both]
        lines.append(
            [
                row,
                spread([figure["linear"] for figure in figures]),
                spread([figure["knn"] for figure in figures]),
                "" if row == other else spread(paired, sign="+"),
                f"{statistics.mean(figure['rank_of_features'] for figure in figures):.0f}",
                f"{statistics.mean(figure['cpu_seconds_per_epoch'] for figure in figures):.0f}",
                ", ".join(str(record["seed"]) for record in own),
            ]
        )
    less = f"linear less {baseline or 'the method'}'s"
    header = ["row", "linear", "kNN", less, "rank", "CPU s / epoch", "seeds"]
    return table(header, lines)


def plot_curves(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws linear accuracy over training: a line a row, a band from least to greatest over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (row, own) in enumerate(rows.items()):
        epochs = [point["epoch"] for point in own[0]["figures"]["curve"]]
        curves = [[point["linear"] for point in record["figures"]["curve"]] for record in own]
        ends = list(zip(*curves, strict=True))
        style = "-" if i < 10 else "--"
        (line,) = axes.plot(epochs, [statistics.mean(e) for e in ends], style, label=row, lw=1.5)
        axes.fill_between(
            epochs,
            *zip(*[(min(e), max(e)) for e in ends], strict=True),
            alpha=0.15,
            color=line.get_color(),
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("linear accuracy in %")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def main(folder: Path = HERE / "results", page: Path = HERE / "RESULTS.md") -> None:
    """Writes what there are results of.

    Args:
        folder: Of the results.
        page: Where the tables stand.
    """
    for name in TABLES:
        records = load(folder / name)
        parts = []
        for epochs in sorted({record["settings"]["epochs"] for record in records}):
            rows = rows_of(name, records, epochs)
            picture = page.with_name(f"{name}_{epochs}.png")
            plot_curves(rows, picture)
            parts += [
                f"{epochs} epochs:",
                accuracy_table(rows, BASELINES.get(name)),
                f"![Linear accuracy over training]({picture.name})",
            ]
        write_between(page, name, "\n\n".join(parts) or "Not run yet.")


if __name__ == "__main__":
    main()

"""The rows of the table, their goals, the check against them and the page made from the results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import load, plot_points, ratio, save_figure, table, write_between
from benchmarks.speed.limits import least_work, per_second

Figures = Mapping[str, Any]
PEERS = ("NT-Xent", "Barlow Twins", "VICReg")
# Part -> what is compared with what; None stands for all others.
PAIRS: dict[str, list[tuple[str | None, str | None]]] = {
    "loss": [(None, "release")],
    "peers": [
        ("ready sketches", "NT-Xent"),
        *[("ready sketches, again", peer) for peer in PEERS[1:]],
    ],
    "memory": [("exact", "release"), ("blocks, n = 4096", "exact, n = 4096")],
    "scattering": [("mvmr-loss", "kymatio 0.3.0")],
    "handcrafted": [("mvmr-loss", None)],
    "step": [(None, "no representations")],
    "modes": [(None, "plain")],
}
# (part, group, ours, theirs) -> the largest ratio aimed at; with "every", in the worst of the runs.
GOALS: dict[tuple[str, str, str, str], tuple[float, str]] = {
    ("loss", "d = 8192", "exact", "release"): (0.30, ""),
    ("loss", "d = 8192", "sketched on the fly", "release"): (0.12, ""),
    ("peers", "d = 2048", "ready sketches", "NT-Xent"): (0.50, ""),
    ("peers", "d = 8192", "ready sketches", "NT-Xent"): (0.30, ""),
    ("peers", "d = 8192", "ready sketches, again", "Barlow Twins"): (0.05, ""),
    ("peers", "d = 8192", "ready sketches, again", "VICReg"): (0.02, ""),
    ("memory", "peak", "exact", "release"): (0.30, ""),
    ("scattering", "32 x 32 x 3, batch 32", "mvmr-loss", "kymatio 0.3.0"): (1 / 12, "every"),
    ("scattering", "96 x 96 x 3, batch 32", "mvmr-loss", "kymatio 0.3.0"): (1 / 8, "every"),
    **{
        ("handcrafted", group, "mvmr-loss", peer): (1.0, "")
        for group, peers in {
            "hog": ("scikit-image, each image", "torch, one-hot bins"),
            "local_std": ("SciPy, whole batch", "torch, unfold"),
            "dct": ("SciPy, whole batch", "torch, by FFT"),
        }.items()
        for peer in peers
    },
    ("step", "ResNet-18, 96 x 96, batch 64", "five, live", "no representations"): (1.08, ""),
}


class Row(NamedTuple):
    """A comparison.

    Attributes:
        part: The part of the benchmark.
        group: What is measured together.
        ours: What is ours.
        theirs: What it is compared with.
        ratios: One a run: the median over its rounds, ours over theirs.
        rounds: The spread over the rounds of a run, the median over runs.
        seconds: Ours, the median over runs; bytes for memory.
        limit: Seconds that the machine's own rates allow, or None.
    """

    part: str
    group: str
    ours: str
    theirs: str
    ratios: Sequence[float]
    rounds: float
    seconds: float
    limit: float | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the row."""
        return self.part, self.group, self.ours, self.theirs

    @property
    def name(self) -> str:
        """The row in words."""
        return f"{self.part}, {self.group}: {self.ours} / {self.theirs}"

    @property
    def ratio(self) -> float:
        """The median over runs."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Half of what lies between the smallest and the largest run; of one run, its rounds' spread."""
        return (max(self.ratios) - min(self.ratios)) / 2 if len(self.ratios) > 1 else self.rounds

    @property
    def goal(self) -> float | None:
        """The largest ratio aimed at."""
        return GOALS[self.key][0] if self.key in GOALS else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, by the median or by every run; None without a goal."""
        if self.goal is None:
            return None
        reached = max(self.ratios) if GOALS[self.key][1] == "every" else self.ratio
        return reached <= self.goal


def rows(results: Sequence[Figures]) -> list[Row]:
    """Returns the comparisons of one device.

    Args:
        results: Records, of which ``settings`` say the part, and ``figures`` hold ``times``: group ->
            name -> seconds (or bytes) of each round.
    """
    by_part: dict[str, list[Figures]] = {}
    for record in results:
        by_part.setdefault(record["settings"]["part"], []).append(record["figures"])
    rate = None
    if "limits" in by_part:
        measured = [per_second(part["times"]["rates"]) for part in by_part["limits"]]
        rate = [max(column) for column in zip(*measured, strict=True)]
    found = []
    for part, pairs in PAIRS.items():
        runs = [figures["times"] for figures in by_part.get(part, [])]
        for group in runs[0] if runs else []:
            names = list(runs[0][group])
            chosen = [
                (ours, theirs)
                for a, b in pairs
                for ours in ([a] if a else names)
                for theirs in ([b] if b else names)
                if ours != theirs and {ours, theirs} <= set(names)
            ]
            for ours, theirs in chosen:
                work = least_work(part, group, ours) if rate else None
                limit = max(work.flops / rate[0], work.bytes / rate[1]) if work and rate else None
                compared = [ratio(run[group][ours], run[group][theirs]) for run in runs]
                found.append(
                    Row(
                        *(part, group, ours, theirs),
                        ratios=[one.value for one in compared],
                        rounds=statistics.median(one.spread for one in compared),
                        seconds=statistics.median(
                            statistics.median(run[group][ours]) for run in runs
                        ),
                        limit=limit,
                    )
                )
    return found


def regressions(measured: Sequence[Row], recorded: Sequence[Row]) -> list[str]:
    """Returns a sentence for each goal that is missed and each ratio that has become worse.

    A ratio is worse if it is above the recorded one by more than the spreads of both over their runs.

    Args:
        measured: The rows of now.
        recorded: Those of the results, of the same machine; may be empty.
    """
    before = {row.key: row for row in recorded}
    found = []
    for row in measured:
        if row.met is False:
            found.append(
                f"{row.name} is {row.ratio:.3g} (up to {max(row.ratios):.3g}), goal {row.goal:.3g}"
            )
        old = before.get(row.key)
        if old is not None and row.ratio > old.ratio + old.spread + row.spread:
            found.append(
                f"{row.name} is {row.ratio:.3g} ± {row.spread:.2g}, "
                f"was {old.ratio:.3g} ± {old.spread:.2g}"
            )
    return found


def write_report(folder: Path) -> None:
    """Writes the marked parts of RESULTS.md and the pictures.

    Args:
        folder: Where RESULTS.md and ``results`` are.
    """
    for device in ("cpu", "cuda"):
        results = load(folder / "results" / device)
        text = f"There are no figures for {device}: they were not measured."
        if results:
            found = rows(results)
            text = _section(device, results, found)
            plot_points(
                folder / f"ratios_{device}.png",
                {row.name: row.ratios for row in found},
                "ratio, ours over theirs; one point a run, bar: goal",
                ours=[row.name for row in found if row.met is not False],
                goals={row.name: row.goal for row in found if row.goal is not None},
                line=("", 1.0),
                log=True,
            )
            for record in results:
                if record["settings"]["part"] == "growth":
                    _plot_growth(folder / f"growth_{device}.png", record["figures"])
        write_between(folder / "RESULTS.md", device, text)


def _section(device: str, results: Sequence[Figures], found: Sequence[Row]) -> str:
    cells = []
    for row in found:
        memory = row.part == "memory"
        value = f"{row.seconds / 2**20:.0f} MiB" if memory else f"{1e3 * row.seconds:.4g} ms"
        goal = ""
        if row.goal is not None:
            every = f", every one of {len(row.ratios)}" if GOALS[row.key][1] else ""
            goal = f"<= {row.goal:.3g}{every}: {'met' if row.met else 'missed'}"
        cells.append(
            [
                f"{row.part}, {row.group}: {row.ours}",
                row.theirs,
                f"{row.ratio:.3g}" + (f" ± {row.spread:.1g}" if row.spread else ""),
                goal,
                value,
                f"{row.seconds / row.limit:.1f}" if row.limit else "",
            ]
        )
    first = results[0]
    machine = first["machine"]
    # Parts that were measured again later are of another one.
    commits = dict.fromkeys(r["code"]["commit"] for r in results)
    name = (
        machine["gpus"][0]
        if device == "cuda"
        else f"{machine['cpu']}, {machine['threads']} threads"
    )
    packages = {(r["code"]["package"], r["code"]["sources"]) for r in results}
    lines = [
        f"{name}; torch {first['versions']['torch']}, mvmr-loss {first['versions']['mvmr_loss']} from "
        f"{' and '.join(sorted({f'a {kind}' for kind, _ in packages}))} "
        f"(commit {' and '.join(commits)}), "
        f"C++ kernels: {'yes' if first['settings']['kernels'] else 'no'}; {first['date']}.",
        "",
        *sorted({r["note"] for r in results if "note" in r}),
        "",
        table(["what", "against", "ratio", "goal", "median", "times the limit"], cells),
        "",
    ]
    figures = {r["settings"]["part"]: r["figures"] for r in results}
    if "limits" in figures:
        limit = per_second(figures["limits"]["times"]["rates"])
        lines.append(
            f"- The machine: {limit.flops / 1e9:.4g} GFLOP/s in a matrix product, "
            f"{limit.bytes / 1e9:.3g} GB/s copying."
        )
    for group, error in figures.get("scattering", {}).get("errors", {}).items():
        lines.append(f"- Scattering, {group}: relative error to kymatio {error:.1e}.")
    for dtype, error in figures.get("modes", {}).get("errors", {}).items():
        lines.append(
            f"- {dtype} embeddings: relative error of the loss {error['loss']:.1e}, of its gradient "
            f"{error['gradient']:.1e}."
        )
    for question, part in figures.get("growth", {}).items():
        if "exponent" in part:
            lines.append(f"- Growth with {question}: exponent {part['exponent']:.2f}.")
    lines += ["", f"![Ratios](ratios_{device}.png)"]
    lines += ["", f"![Time over size](growth_{device}.png)"] if "growth" in figures else []
    return "\n".join(lines)


def _plot_growth(path: Path, growth: Figures) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, (question, part) in zip(figure.subplots(2, 3).flat, growth.items(), strict=False):
        axis.plot(part["sizes"], [1e3 * s for s in part["seconds"]], "o-", color="#2a6f97")
        title = question.replace(" (", "\n(")
        if "exponent" in part:
            title += f"\nexponent {part['exponent']:.2f}"
            axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(part["sizes"], [str(size) for size in part["sizes"]])
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("milliseconds")
        axis.grid(alpha=0.3)
    for axis in figure.axes[len(growth) :]:
        axis.axis("off")
    save_figure(path, figure)

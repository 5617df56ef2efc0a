"""The page, the plots and the history made from the results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.records import atomic_path

RELEASE = "release's formulation"
NOTES = """\
## How to read it

- The goals were set beforehand. Ratios differ by a tenth or so from run to run on a shared
  machine, more where memory is what is waited for.
- *Compiled*: torch.compile with `fullgraph=True`. On a CPU, Gram matrices, scattering, HOG and
  sketches are custom ops in the graph, so compiling pays for the small steps of the loss and the DCT.
- *In blocks*: it saves memory for time. Every distance is computed again for each comparison.
- Growth with n: the work grows as n^2 d, the distances'. The fitted exponent is above 2 because
  matrices of 1024 x 1024 and more do not fit into the cache; that with d is below 1 because of the
  work that is n^2 alone.
- Growth with the image: the pixels are the size squared. The scattering's FFTs add a logarithm,
  and 224 has a factor 7.
"""


class Row(NamedTuple):
    """A comparison.

    Attributes:
        part: The part of the results it belongs to.
        what: What is ours.
        against: What it is compared with.
        ratio: Of times or of bytes, ours over theirs.
        goal: The largest ratio aimed at, or None.
    """

    part: str
    what: str
    against: str
    ratio: float
    goal: float | None = None

    @property
    def name(self) -> str:
        """What identifies the row in the history."""
        return f"{self.what} / {self.against}"


def rows(results: dict[str, Any]) -> list[Row]:
    """Returns the comparisons that a results file holds.

    Args:
        results: Part -> environment and ``result``.

    Returns:
        A row a comparison, of the parts there are.
    """
    found = {name: part["result"] for name, part in results.items()}
    table: list[Row] = []
    if "release" in found:
        times = found["release"]
        goals = {"exact": 1 / 3, "sketched on the fly": 1 / 8}
        table += [
            Row(
                "release",
                f"loss at d = 8192, {name}",
                RELEASE,
                t / times["release"],
                goals.get(name),
            )
            for name, t in times.items()
            if name != "release"
        ]
    peer_goals = {
        ("8192", "NT-Xent"): 0.5,
        ("8192", "Barlow Twins"): 0.05,
        ("8192", "VICReg"): 0.02,
        ("2048", "NT-Xent"): 1.0,
    }
    for d, times in found.get("peers", {}).items():
        ours = times["MV-MR, ready sketches"]
        table += [
            Row(
                "peers",
                f"loss at d = {d}, ready sketches",
                peer,
                ours / times[peer],
                peer_goals.get((d, peer)),
            )
            for peer in ("NT-Xent", "Barlow Twins", "VICReg")
        ]
    if "memory" in found:
        peak = found["memory"]
        ratio = peak["exact"] / peak["release"]
        table.append(Row("memory", "peak memory, exact", RELEASE, ratio, 0.5))
        ratio = peak["blocks, n = 4096"] / peak["exact, n = 4096"]
        table.append(Row("memory", "peak memory in blocks, n = 4096", "exact", ratio))
    for size, part in found.get("scattering", {}).items():
        times = part["seconds"]
        table.append(
            Row(
                "scattering",
                f"scattering, {size} x {size} x 3, batch 32",
                "kymatio 0.3.0",
                times["mvmr-loss"] / times["kymatio 0.3.0"],
                {"32": 0.2, "96": 0.125}.get(size),
            )
        )
    for name, times in found.get("handcrafted", {}).items():
        table += [
            Row("handcrafted", name, peer, times["mvmr-loss"] / seconds, 1.0)
            for peer, seconds in times.items()
            if peer != "mvmr-loss"
        ]
    if "step" in found:
        times = found["step"]
        none = "no representations"
        table += [
            Row(
                "step",
                f"step of ResNet-18, 96 x 96, batch 64: {name}",
                none,
                seconds / times[none],
                1.3 if name == "five, live" else None,
            )
            for name, seconds in times.items()
            if name != none
        ]
    for what, times in found.get("modes", {}).get("seconds", {}).items():
        table += [
            Row("modes", f"{what}, {mode}", "plain", seconds / times["plain"])
            for mode, seconds in times.items()
            if mode != "plain"
        ]
    return table


def record(folder: Path, device: str, results: dict[str, Any], measured: list[str]) -> None:
    """Adds a line to the history: the ratios of the parts that were measured now.

    Args:
        folder: Of the benchmark's results.
        device: ``"cpu"`` or ``"cuda"``.
        results: The content of the device's results file.
        measured: The parts measured now.
    """
    table = [row for row in rows(results) if row.part in measured]
    if not table:
        return
    part = results[measured[0]]
    line = {
        "version": part["versions"]["mvmr_loss"],
        "torch": part["versions"]["torch"],
        "device": device,
        "machine": _machine(part),
        "ratios": {row.name: round(row.ratio, 4) for row in table},
    }
    with (folder / "results" / "history.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_report(folder: Path) -> None:
    """Writes RESULTS.md and the plots from the results files of every device.

    Args:
        folder: Of the benchmark's results.
    """
    path = folder / "results" / "history.jsonl"
    history = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [
        "# Speed and memory",
        "",
        "Made by `python -m benchmarks.speed`. Ratios of medians from one run, interleaved: below 1 is",
        "faster (or smaller) than the peer. *Before* is the run before in `results/history.jsonl`, so",
        "that a regression shows.",
        "",
    ]
    for device in ("cpu", "cuda"):
        file = folder / "results" / f"{device}.json"
        if not file.exists():
            lines += [f"There are no figures for {device}: they were not measured.", ""]
            continue
        results = json.loads(file.read_text())
        lines += _section(device, results, [line for line in history if line["device"] == device])
        if "growth" in results:
            lines += [f"![Time over size](growth_{device}.png)", ""]
            _plot_growth(folder / f"growth_{device}.png", results["growth"]["result"])
        if rows(results):
            lines += [f"![Ratios](ratios_{device}.png)", ""]
            _plot_ratios(folder / f"ratios_{device}.png", rows(results))
    with atomic_path(folder / "RESULTS.md") as temporary:
        temporary.write_text("\n".join([*lines, NOTES]))


def _machine(part: dict[str, Any]) -> str:
    machine = part["machine"]
    return ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['threads']} threads"


def _kernels(device: str, part: dict[str, Any]) -> str:
    if device != "cpu" or "kernels" not in part:
        return ""
    return f", {'with' if part['kernels'] else 'without'} its C++ kernels"


def _section(device: str, results: dict[str, Any], history: list[dict[str, Any]]) -> list[str]:
    """Returns the table and the figures behind it."""
    part = next(iter(results.values()))
    versions = part["versions"]
    lines = [
        f"## {device}",
        "",
        f"{_machine(part)}; torch {versions['torch']}, kornia {versions['kornia']}, "
        f"mvmr-loss {versions['mvmr_loss']}{_kernels(device, part)}.",
        "",
        "| what | against | ratio | goal | met | before |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows(results):
        known = [line["ratios"][row.name] for line in history if row.name in line["ratios"]]
        before = f"{known[-2]:.3g}" if len(known) > 1 else ""
        goal = met = ""
        if row.goal is not None:
            goal, met = f"<= {row.goal:.3g}", "yes" if row.ratio <= row.goal else "no"
        lines.append(
            f"| {row.what} | {row.against} | {row.ratio:.3g} | {goal} | {met} | {before} |"
        )
    return [*lines, "", *_figures(results)]


def _figures(results: dict[str, Any]) -> list[str]:
    """Returns the medians behind the ratios, and what is no ratio."""
    found = {name: part["result"] for name, part in results.items()}
    times: dict[str, dict[str, float]] = {
        name: found[name] for name in ("release", "step") if name in found
    }
    for name in ("peers", "handcrafted"):
        times |= {f"{name}, {key}": value for key, value in found.get(name, {}).items()}
    for name, part in found.get("scattering", {}).items():
        times[f"scattering, {name}"] = part["seconds"]
    modes = found.get("modes", {"seconds": {}, "errors": {}})
    times |= {f"modes, {name}": value for name, value in modes["seconds"].items()}
    lines = [
        f"- {name}: " + ", ".join(f"{key} {1e3 * value:.4g} ms" for key, value in part.items())
        for name, part in times.items()
    ]
    if "memory" in found:
        peaks = (f"{key} {value / 2**20:.0f} MiB" for key, value in found["memory"].items())
        lines.append("- memory: " + ", ".join(peaks))
    lines += [
        f"- scattering, {size}: relative error {part['error']:.1e}"
        for size, part in found.get("scattering", {}).items()
    ]
    lines += [
        f"- {dtype} embeddings: relative error of the loss {error['loss']:.1e}, of its gradient "
        f"{error['gradient']:.1e}"
        for dtype, error in modes["errors"].items()
    ]
    lines += [
        f"- growth with {question}: exponent {part['exponent']:.2f}"
        for question, part in found.get("growth", {}).items()
        if "exponent" in part
    ]
    return ["Medians behind the ratios, and errors:", "", *lines, ""]


def _plot_growth(path: Path, growth: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (question, part) in zip(axes.flat, growth.items(), strict=False):
        axis.plot(part["sizes"], [1e3 * s for s in part["seconds"]], "o-", color="#2a6f97")
        title = question.replace(" (", "\n(")
        if "exponent" in part:
            title += f"\nexponent {part['exponent']:.2f}"
            axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_xticks(part["sizes"], [str(size) for size in part["sizes"]])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("milliseconds")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(growth) :]:
        axis.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _plot_ratios(path: Path, table: list[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.27 * len(table)), layout="constrained")
    for i, row in enumerate(table):
        met = row.goal is None or row.ratio <= row.goal
        axis.plot([1, row.ratio], [i, i], color="0.8", lw=1.5, zorder=1)
        axis.plot(row.ratio, i, "o", color="#2a6f97" if met else "#c1440e", zorder=2)
        if row.goal is not None:
            axis.plot(row.goal, i, "|", color="black", ms=11, mew=1.5, zorder=3)
    axis.axvline(1, color="black", lw=0.8)
    axis.set_yticks(range(len(table)), [row.name for row in table], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("ratio, ours over theirs (bar: goal; red: goal missed)")
    axis.grid(axis="x", alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)

"""The table, the plots and the history made from a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common.results import atomic_path

Row = tuple[str, str, float, str]


def rows(results: dict[str, Any]) -> list[Row]:
    """Returns what, against what, the ratio of ours to theirs, and the goal.

    Args:
        results: The content of a results file.

    Returns:
        A row a comparison, of the parts there are.
    """
    found = {name: part["result"] for name, part in results.items()}
    table: list[Row] = []
    if "release" in found:
        times = found["release"]
        goals = {
            "exact": "<= 0.333",
            "sketched on the fly": "<= 0.125",
            "ready sketches": "-",
            "exact, in blocks": "-",
            "exact, compiled": "-",
        }
        table += [
            (
                f"loss at d = 8192, {name}",
                "release's formulation",
                times[name] / times["release"],
                goal,
            )
            for name, goal in goals.items()
        ]
    if "peers" in found:
        goals = {
            ("8192", "NT-Xent"): "<= 0.5",
            ("8192", "Barlow Twins"): "<= 0.05",
            ("8192", "VICReg"): "<= 0.02",
            ("2048", "NT-Xent"): "< 1",
        }
        for d, times in found["peers"].items():
            for peer in ("NT-Xent", "Barlow Twins", "VICReg"):
                table.append(
                    (
                        f"loss at d = {d}, ready sketches",
                        peer,
                        times["MV-MR, ready sketches"] / times[peer],
                        goals.get((d, peer), "-"),
                    )
                )
    if "memory" in found:
        peak = found["memory"]
        table += [
            (
                "peak memory, exact",
                "release's formulation",
                peak["exact"] / peak["release"],
                "<= 0.5",
            ),
            (
                "peak memory in blocks, n = 4096",
                "exact",
                peak["blocks, n = 4096"] / peak["exact, n = 4096"],
                "-",
            ),
        ]
    for size, part in found.get("scattering", {}).items():
        times = part["seconds"]
        table.append(
            (
                f"scattering at {size} x {size}, error {part['error']:.0e}",
                "kymatio 0.3.0",
                times["mvmr-loss"] / times["kymatio 0.3.0"],
                "<= 0.2" if size == "32" else "<= 0.125",
            )
        )
    for name, times in found.get("handcrafted", {}).items():
        table += [
            (name, peer, times["mvmr-loss"] / seconds, "< 1")
            for peer, seconds in times.items()
            if peer != "mvmr-loss"
        ]
    if "step" in found:
        times = found["step"]
        table += [
            (
                f"step of ResNet-18, 96 x 96, batch 64: {name}",
                "no representations",
                seconds / times["no representations"],
                "<= 1.3" if name == "five, live" else "-",
            )
            for name, seconds in times.items()
            if name != "no representations"
        ]
    return table


def write_report(folder: Path, device: str, results: dict[str, Any]) -> None:
    """Writes the Markdown table, the growth plot and a line of history.

    Args:
        folder: Where to write.
        device: ``"cpu"`` or ``"cuda"``.
        results: The content of a results file.
    """
    table = rows(results)
    part = next(iter(results.values()))
    machine, versions = part["machine"], part["versions"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"# Speed and memory: {device}",
        "",
        f"Ratios of medians from one run, interleaved: below 1 is faster (or smaller) than the peer. {where};"
        f" torch {versions['torch']}, kornia {versions['kornia']}, mvmr-loss {versions['mvmr_loss']}."
        f" Made by `{part['command']}`.",
        "",
        "| what | against | ratio | goal |",
        "| --- | --- | --- | --- |",
        *(f"| {what} | {peer} | {ratio:.3g} | {goal} |" for what, peer, ratio, goal in table),
        "",
        *_seconds(results),
    ]
    if "growth" in results:
        lines += [f"![Time over size](growth_{device}.png)", ""]
        _plot_growth(folder / f"growth_{device}.png", results["growth"]["result"])
    with atomic_path(folder / f"RESULTS_{device}.md") as path:
        path.write_text("\n".join(lines))
    history = {
        "version": versions["mvmr_loss"],
        "torch": versions["torch"],
        "where": where,
        "ratios": {f"{what} / {peer}": round(ratio, 4) for what, peer, ratio, _ in table},
    }
    with (folder / "results" / f"history_{device}.jsonl").open("a") as file:
        file.write(json.dumps(history) + "\n")


def _seconds(results: dict[str, Any]) -> list[str]:
    """Returns the times behind the ratios."""
    lines = ["Medians behind the ratios:", ""]
    for name in ("release", "step"):
        if name in results:
            times = results[name]["result"]
            lines.append(
                f"- {name}: " + ", ".join(f"{k} {1e3 * v:.4g} ms" for k, v in times.items())
            )
    for name in ("peers", "handcrafted"):
        for key, times in results.get(name, {}).get("result", {}).items():
            lines.append(
                f"- {name}, {key}: " + ", ".join(f"{k} {1e3 * v:.4g} ms" for k, v in times.items())
            )
    for key, part in results.get("scattering", {}).get("result", {}).items():
        times = part["seconds"]
        lines.append(
            f"- scattering, {key}: " + ", ".join(f"{k} {1e3 * v:.4g} ms" for k, v in times.items())
        )
    if "memory" in results:
        peak = results["memory"]["result"]
        lines.append("- memory: " + ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in peak.items()))
    for question, part in results.get("growth", {}).get("result", {}).items():
        if "exponent" in part:
            lines.append(f"- growth with {question}: exponent {part['exponent']:.2f}")
    return [*lines, ""]


def _plot_growth(path: Path, growth: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (question, part) in zip(axes.flat, growth.items(), strict=False):
        axis.plot(part["sizes"], [1e3 * s for s in part["seconds"]], "o-", color="#2a6f97")
        title = question.replace(" (", "\n(")
        if "exponent" in part:
            title += f"\nexponent {part['exponent']:.2f}"
            axis.set_xscale("log", base=2)
        axis.set_yscale("log")
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

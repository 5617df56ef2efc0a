"""Speed and memory beside the peers: measures what is not measured yet, or checks for regressions.

python -m benchmarks.speed                      all parts, five runs, on the CPU with two threads
python -m benchmarks.speed --again --only loss  some parts anew
python -m benchmarks.speed --device cuda        the same table on a GPU
python -m benchmarks.speed --check              measures aside; fails at a missed goal or a regression
python -m benchmarks.speed --check --counts     the part of it that needs no clock, as in CI
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Run, load, plain_errors, run_all
from benchmarks.speed import counts, growth, limits, losses, modes, representations, training_step
from benchmarks.speed.table import regressions, rows, write_report
from mvmr_loss import kernels

FOLDER = Path(__file__).resolve().parent


def _scattering(device: torch.device, repeats: int) -> dict[str, Any]:
    found = {
        f"{size} x {size} x 3, batch 32": representations.scattering(size, device, repeats)
        for size in (32, 96)
    }
    return {
        key: {g: part[key[:-1] if key == "errors" else key] for g, part in found.items()}
        for key in ("times", "errors")
    }


# Part -> what measures it, from a device and a number of rounds.
PARTS: dict[str, Callable[[torch.device, int], dict[str, Any]]] = {
    "limits": lambda device, n: {"times": {"rates": limits.rates(device, n)}},
    "loss": lambda device, n: {"times": {"d = 8192": losses.against_release(device, n)}},
    "peers": lambda device, n: {
        "times": {f"d = {d}": losses.against_peers(d, device, n) for d in (2048, 8192)}
    },
    "memory": lambda device, n: {"times": {"peak": losses.memory(device)}},
    "scattering": _scattering,
    "handcrafted": lambda device, n: {"times": representations.handcrafted(96, device, n)},
    "step": lambda device, n: {
        "times": {"ResNet-18, 96 x 96, batch 64": training_step.live_representations(device, n)}
    },
    "modes": modes.modes,
    "growth": growth.growth,
}


def has_kernels() -> bool:
    """Tells whether the C++ kernels for CPUs are used on this machine."""
    return all(status.on for status in kernels())


def plan(device: str, runs: int, repeats: int, parts: Sequence[str]) -> Iterator[Run]:
    """Yields every part once, then once again: runs of one part are apart in time."""
    for run in range(runs):
        for part in parts:
            if part == "growth" and run:
                continue
            settings = {
                "part": part,
                "device": device,
                "repeats": repeats,
                "kernels": has_kernels(),
            }
            yield Run(f"{device}/{part}-run{run}", settings)


def measure(run: Run) -> dict[str, Any]:
    """Measures one part once."""
    return PARTS[run.settings["part"]](
        torch.device(run.settings["device"]), run.settings["repeats"]
    )


def check(folder: Path, planned: Sequence[Run], device: str) -> list[str]:
    """Measures aside and returns what is wrong.

    Args:
        folder: Where the recorded results are.
        planned: The runs; none: counts are checked alone.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        A sentence for each missed goal, each ratio worse than recorded on this machine by more than
        its spread, and each count that has grown; ratios of another machine are not compared.
    """
    found = counts.regressions(counts.counts(), folder / "results")
    if not planned:
        return found
    with tempfile.TemporaryDirectory() as aside:
        run_all(planned, aside, measure)
        measured = load(aside)
    machine = measured[0]["machine"]
    recorded = [r for r in load(folder / "results" / device) if r["machine"] == machine]
    if not recorded:
        print("No results of this machine are recorded: goals and counts are checked alone.")
    return found + regressions(rows(measured), rows(recorded))


def main(command: Sequence[str] | None = None) -> None:
    """Runs the parts named on the command line and writes what they found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    add("--threads", type=int, default=2, help="threads of torch on the CPU")
    add("--runs", type=int, default=5, help="times that each part is measured")
    add("--repeats", type=int, default=5, help="timed rounds of a run")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these parts")
    add("--again", action="store_true", help="measure anew what is measured already")
    add("--check", action="store_true", help="write nothing, fail at a regression or missed goal")
    add("--counts", action="store_true", help="record launches, operations and bytes, no times")
    add("--output", type=Path, default=FOLDER, help="folder of RESULTS.md and results/")
    given = parser.parse_args(command)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, and there is none")
    torch.set_num_threads(given.threads)
    planned = list(plan(given.device, given.runs, given.repeats, given.only))
    if given.check and given.counts:
        planned = []
    with plain_errors():
        if given.check:
            found = check(given.output, planned, given.device)
            for sentence in found:
                print(sentence)
            if found:
                raise SystemExit(f"{len(found)} regressions or missed goals")
            print(
                "No count has grown." if given.counts else "No regression, and every goal is met."
            )
            return
        if given.counts or not (given.output / "results" / "counts.json").exists():
            counts.record_counts(given.output / "results")
        if given.counts:
            return
        run_all(planned, given.output / "results", measure, again=given.again)
        write_report(given.output)


if __name__ == "__main__":
    main()

"""Measures on a GPU what there is to measure, and leaves JSON as each run ends.

python -m benchmarks.gpu --minutes 8 --output runs/gpu                again, it goes on where it stopped
python -m benchmarks.gpu --report                                     pages of what is there
python -m benchmarks.gpu --device cpu --miniature --output runs/try   everything, small, in a minute

Under the output, folders are those of benchmarks/: speed/results/ and gpu/results/. The studies of
learning have commands of their own, which use a GPU, too: benchmarks.quality and .distillation.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.report import write_report
from benchmarks.harness import Run, plain_errors, run_all
from benchmarks.speed import __main__ as speed
from benchmarks.speed.table import write_report as write_speed_report

BENCHMARKS = Path(__file__).resolve().parents[1]
Measure = Callable[[Run], Mapping[str, Any]]


class Size(NamedTuple):
    """How large everything is.

    Attributes:
        sides: Side of the images in pixels -> images a step.
        backbone: Name of torchvision's network.
        width: Of the embeddings.
        modes: How the network runs.
        preset: Of the STL10 benchmark, whose cost is measured.
        batch_size: Images a step of it; None is the preset's.
        steps: Of the preset.
        repeats: Timed rounds.
        speed: Parts of the speed table, in the order of worth.
    """

    sides: Mapping[int, int]
    backbone: str
    width: int
    modes: Sequence[str]
    preset: str
    batch_size: int | None
    steps: int
    repeats: int
    speed: Sequence[str]


FULL = Size(
    sides={96: 256, 224: 128},
    backbone="resnet50",
    width=8192,
    modes=("eager", "bf16", "compiled", "bf16, compiled"),
    preset="paper",
    batch_size=None,
    steps=30,
    repeats=5,
    speed=(
        *("limits", "loss", "peers", "scattering", "memory", "step", "growth", "handcrafted"),
        "modes",
    ),
)
MINIATURE = Size(
    sides={32: 4},
    backbone="resnet18",
    width=16,
    modes=("eager", "bf16, compiled"),  # bfloat16 is slow on most CPUs
    preset="quick",
    batch_size=16,
    steps=3,
    repeats=1,
    speed=("limits",),
)


class Planned(NamedTuple):
    """A run, the folder of its result under the output, and what measures it."""

    part: str
    folder: str
    run: Run
    measure: Measure


def plan(size: Size, device: str) -> Iterator[Planned]:
    """Yields all runs, what tells most for its time first.

    Args:
        size: How large they are.
        device: ``"cuda"``, or ``"cpu"`` to try it.
    """

    def measure(run: Run) -> Mapping[str, Any]:
        return PARTS[run.settings["part"]](run.settings, torch.device(device))

    def one(part: str, name: str, **settings: Any) -> Planned:
        run = Run(name, {"part": part, "device": device, **settings})
        return Planned(part, "gpu/results", run, measure)

    table = [
        Planned("speed", "speed/results", run, speed.measure)
        for run in speed.plan(device, 1, size.repeats, size.speed)
    ]
    # The machine's rates and the losses; what is compiled at length comes later.
    yield from table[:4]
    yield one("launches", "launches", n=256, d=2048, images=64, side=min(size.sides))
    for side, images in size.sides.items():
        name = f"representations-{side}"
        yield one("representations", name, side=side, images=images, repeats=size.repeats)
    cost = {"preset": size.preset, "batch_size": size.batch_size, "steps": size.steps}
    yield one("paper", f"{size.preset}-preset", **cost)
    for mode in size.modes:
        for side, images in size.sides.items():
            yield one(
                "step",
                f"{size.backbone}-{side}-{mode.replace(', ', '-')}",
                backbone=size.backbone,
                side=side,
                images=images,
                width=size.width,
                mode=mode,
                repeats=size.repeats,
            )
    yield from table[4:]


def run_in_time(planned: Sequence[Planned], output: Path, minutes: float) -> list[str]:
    """Makes what is not there yet, until the time is up; a run that fails does not stop the others.

    Args:
        planned: The runs.
        output: Under which the results are.
        minutes: None of them begins later.

    Returns:
        A sentence for each run that failed.
    """
    deadline, failed = time.monotonic() + 60 * minutes, []
    for part in planned:
        if time.monotonic() >= deadline:
            break
        try:
            run_all([part.run], output / part.folder, part.measure)
        except Exception as error:
            failed.append(f"{part.folder}/{part.run.name} failed: {type(error).__name__}: {error}")
            print(failed[-1], file=sys.stderr, flush=True)
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


def main(command: Sequence[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parts = ("speed", *PARTS)
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="where to run")
    add("--minutes", type=float, default=8, help="no run begins later")
    add("--only", nargs="+", choices=parts, default=list(parts), metavar="PART", help="these parts")
    add("--miniature", action="store_true", help="everything small, to try it")
    add("--report", action="store_true", help="measure nothing, write pages of the results")
    add("--output", type=Path, default=BENCHMARKS, help="folder of the results")
    given = parser.parse_args(command)
    if given.report:
        with plain_errors():
            write_report(given.output / "gpu")
            write_speed_report(given.output / "speed")
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, and there is none")
    if given.miniature and given.output.resolve() == BENCHMARKS:
        parser.error("--miniature needs an --output: its results are no results")
    size = MINIATURE if given.miniature else FULL
    planned = [p for p in plan(size, given.device) if p.part in given.only]
    with plain_errors():
        failed = run_in_time(planned, given.output, given.minutes)
    left = [p for p in planned if not (given.output / p.folder / f"{p.run.name}.json").exists()]
    if failed:
        raise SystemExit(f"{len(failed)} runs failed, {len(left)} are left.")
    print(f"{len(left)} of {len(planned)} runs are left" + (": run it again" if left else ""))


if __name__ == "__main__":
    main()

"""Runs every speed and memory comparison and writes JSON, a table, plots and a line of history.

python -m benchmarks.speed                     all of it, on the CPU with two threads
python -m benchmarks.speed --device cuda       the same table on a GPU, in its own results file
python -m benchmarks.speed --only peers        a part of it, kept beside the others' last results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import environment, write_json
from benchmarks.speed import growth, losses, modes, representations, training_step
from benchmarks.speed.report import record, write_report
from mvmr_loss import kernels

FOLDER = Path(__file__).parent


def has_kernels() -> bool:
    """Tells whether the C++ kernels for CPUs are used on this machine."""
    return all(status.on for status in kernels())


def main(command: Sequence[str] | None = None) -> None:
    """Runs the parts named on the command line and writes what they found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each comparison")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the results")
    device = torch.device("cpu")
    parts: dict[str, Callable[[], Any]] = {
        "release": lambda: losses.against_release(device, arguments.repeats),
        "peers": lambda: {
            str(d): losses.against_peers(d, device, arguments.repeats) for d in (2048, 8192)
        },
        "memory": lambda: losses.memory(device),
        "scattering": lambda: {
            str(size): representations.scattering(size, device, arguments.repeats)
            for size in (32, 96)
        },
        "handcrafted": lambda: representations.handcrafted(96, device, arguments.repeats),
        "step": lambda: training_step.live_representations(device, arguments.repeats),
        "modes": lambda: modes.modes(device, arguments.repeats),
        "growth": lambda: growth.growth(device, max(3, arguments.repeats // 2)),
    }
    parser.add_argument("--only", nargs="+", choices=parts, help="run these parts only")
    arguments = parser.parse_args(command)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, and there is none")
    torch.set_num_threads(arguments.threads)

    path = arguments.output / "results" / f"{device.type}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    measured = arguments.only or list(parts)
    for name in measured:
        print(f"{name} ...", flush=True)
        results[name] = {**environment(), "kernels": has_kernels(), "result": parts[name]()}
        write_json(path, results)
    record(arguments.output, device.type, results, measured)
    write_report(arguments.output)
    print(f"wrote {arguments.output / 'RESULTS.md'}")


if __name__ == "__main__":
    main()

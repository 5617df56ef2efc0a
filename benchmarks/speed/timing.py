"""Comparing things by time and memory in one run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished, so that a host clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(
    candidates: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    repeats: int = 7,
    warmup: int = 2,
) -> dict[str, float]:
    """Returns the median time of each candidate in seconds.

    The candidates take turns, in an order that is reversed each round: what slows the machine for a
    while slows all of them.

    Args:
        candidates: Name -> what to run.
        device: Where it runs.
        repeats: Timed rounds.
        warmup: Rounds before, not timed.

    Returns:
        Name -> median seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for round_ in range(warmup + repeats):
        for name in names if round_ % 2 else reversed(names):
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """Returns by how many bytes the memory rises above the present while ``run`` runs.

    On a CPU this is the process's resident set (the kernel's high-water mark, which is reset first),
    so it is measured best in a process of its own; on a GPU the allocator's count.

    Args:
        run: What to run.
        device: Where it runs.

    Returns:
        Bytes.

    Raises:
        OSError: If the system does not tell the high-water mark (only Linux does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return float(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")

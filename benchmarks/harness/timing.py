"""Comparing things by time and memory in one run."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Times = dict[str, list[float]]


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished, so that a host clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    *,
    repeats: int = 7,
    warmup: int = 2,
) -> Times:
    """Times candidates that take turns, in an order that is reversed each round.

    What slows the machine for a while slows all of them, so the times of one round belong together:
    see :func:`ratio`.

    Args:
        candidates: Name -> what to run.
        device: Where it runs.
        repeats: Timed rounds, at least 1.
        warmup: Rounds before, not timed.

    Returns:
        Name -> seconds of each round, with four digits.

    Raises:
        ValueError: If ``repeats`` is below 1 or ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(
            f"repeats must be at least 1 and warmup at least 0 but are {repeats} and {warmup}."
        )
    device = torch.device(device)
    times: Times = {name: [] for name in candidates}
    names = list(candidates)
    for round_ in range(warmup + repeats):
        for name in names if round_ % 2 else reversed(names):
            synchronize(device)
            start = time.perf_counter()
            candidates[name]()
            synchronize(device)
            seconds = time.perf_counter() - start
            if round_ >= warmup:
                times[name].append(float(f"{seconds:.4g}"))
    return times


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, so that a step finds it where the last left it.

    glibc gives large blocks back at once and asks for them anew in the next step. The system then
    clears them page by page, which takes a fifth of a ResNet-18's step on a CPU and varies by more
    than what is compared. Peak memory is not to be measured in such a process.

    Source: mallopt(3) of the Linux manual pages.

    Returns:
        Whether it does; False where the C library is not glibc.
    """
    linux = sys.platform == "linux"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if linux else None
    if mallopt is None:
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the names are glibc's
    wanted = {mmap_max: 0, trim_threshold: -1, top_pad: 1 << 28}
    return min(mallopt(option, value) for option, value in wanted.items()) == 1


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median of each candidate's seconds."""
    return {name: statistics.median(values) for name, values in times.items()}


class Ratio(NamedTuple):
    """How one thing's time or size compares with another's, measured in rounds.

    Attributes:
        value: The median over rounds of ours over theirs.
        spread: Half the distance between the quartiles over rounds; 0 with one round.
    """

    value: float
    spread: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compares two candidates round by round.

    Args:
        ours: Seconds or bytes of each round.
        theirs: The same of what it is compared with, as many.

    Returns:
        The median of the rounds' ratios, and their spread.

    Raises:
        ValueError: If there are no rounds, or not as many of both.

    Examples:
        >>> ratio([1.0, 1.1, 3.0], [2.0, 2.0, 6.0])
        Ratio(value=0.5, spread=0.0125)
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(
            f"ours and theirs must have the same rounds, at least 1, but have {len(ours)} and "
            f"{len(theirs)}."
        )
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(rounds) == 1:
        return Ratio(rounds[0], 0.0)
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Ratio(middle, round((high - low) / 2, 12))


def peak_memory(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
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
    device = torch.device(device)
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

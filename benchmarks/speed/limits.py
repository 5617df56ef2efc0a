"""How fast this machine multiplies matrices and moves memory, and the least work of each row.

The limit of a row is the time of its least work at those rates: the larger of operations over the
rate of a matrix product and bytes over the rate of memory, each input read once and each output
written once. Nothing that computes the row in float32 by the usual algorithm can be faster, but for
what the caches keep.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.timing import Times, interleaved
from benchmarks.speed.losses import SIZES, SKETCH_DIM
from mvmr_loss import MVMRProjectionHead

SIDE, MIB = 2048, 256


class Work(NamedTuple):
    """The least that must be done: floating-point operations (a multiply-add is two), bytes."""

    flops: float
    bytes: float


def rates(device: torch.device, repeats: int) -> Times:
    """Times a matrix product and a copy.

    Args:
        device: Where to run.
        repeats: Timed rounds.

    Returns:
        ``"matrix product"``: seconds of each round of two matrices of 2048 x 2048 in float32, and
        ``"copy"`` of 256 MiB, which are read and written.
    """
    a, b = torch.randn(2, SIDE, SIDE, device=device)
    source = torch.ones(MIB * 2**18, device=device)
    out, target = torch.empty_like(a), torch.empty_like(source)
    return interleaved(
        {
            "matrix product": lambda: torch.mm(a, b, out=out),
            "copy": lambda: target.copy_(source),
        },
        device,
        repeats=repeats,
    )


def per_second(times: Times) -> Work:
    """Returns the rates that :func:`rates` measured, of the fastest round: flops and bytes a second."""
    return Work(2 * SIDE**3 / min(times["matrix product"]), 2 * MIB * 2**20 / min(times["copy"]))


def loss_work(d: int, widths: list[int], n: int = 256) -> Work:
    """Returns the work of the loss, forward and backward.

    Half of each symmetric Gram matrix and two gradients; every input read and every gradient written
    once.

    Examples:
        >>> loss_work(2048, [1024] * 5).bytes == 4 * 256 * (4 * 2048 + 5 * 1024)
        True
    """
    total = sum(widths) + 2 * d
    return Work(n * n * total + 2 * 2 * n * n * d, 4 * n * (total + 2 * d))


def pixelwise_work(name: str, size: int, n: int) -> Work:
    """Returns the work of HOG, local standard deviation or DCT of n RGB images."""
    images = 3 * n
    outputs = {"hog": 24 * (size // 8) ** 2, "local_std": size**2, "dct": size**2}
    flops = images * 4 * size**3 if name == "dct" else 0
    return Work(flops, 4 * images * (size**2 + outputs[name]))


def scattering_work(size: int, n: int = 32) -> Work:
    """Returns the work of the FFTs of scattering J=2, L=8 of n RGB images, 5 N log2 N each."""

    def fft(points: float) -> float:
        return 5 * points * math.log2(points)

    side = size + 8
    whole, quarter = side**2, side**2 / 4
    # Real transforms are half; 8 wavelets at each of 2 scales, then 64 paths of second order.
    one = 9 * fft(whole) / 2 + 8 * fft(whole) + (8 + 64) * fft(quarter)
    return Work(3 * n * one, 4 * 3 * n * (size**2 + 81 * (size // 4) ** 2))


@functools.cache
def step_work(batch_size: int = 64, size: int = 96) -> Work:
    """Returns the operations of a step of ResNet-18 with a head, of two views, counted."""
    from torchvision.models import resnet18

    with torch.device("meta"):
        backbone = resnet18()
        backbone.fc = nn.Identity()
        network = nn.Sequential(backbone, MVMRProjectionHead(512, 2048, 2048))
        images = torch.empty(2 * batch_size, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    return Work(counter.get_total_flops(), 0)


def least_work(part: str, group: str, ours: str) -> Work | None:
    """Returns the least work of a row of the table, or None of a row that is no time."""
    if part == "loss":
        if ours == "sketched on the fly":
            reduced = loss_work(8192, [SKETCH_DIM] * 5)
            return Work(reduced.flops, reduced.bytes + 4 * 256 * sum(SIZES.values()))
        ready = ours == "ready sketches"
        return loss_work(8192, [SKETCH_DIM] * 5 if ready else list(SIZES.values()))
    if part == "peers":
        return loss_work(int(group.rpartition(" ")[2]), [SKETCH_DIM] * 5)
    if part == "scattering":
        return scattering_work(int(group.partition(" ")[0]))
    if part == "handcrafted":
        return pixelwise_work(group, 96, 64)
    if part == "modes":
        if group.startswith("loss"):
            return loss_work(2048, [SKETCH_DIM] * 5)
        return scattering_work(96) if group == "scattering" else pixelwise_work(group, 96, 32)
    if part == "step":
        return step_work()
    return None

"""What compiling, channels-last images and half precision gain or cost."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness.timing import interleaved
from benchmarks.speed.losses import SIZES, SKETCH_DIM, embeddings, features, step
from benchmarks.speed.representations import photographs
from mvmr_loss import MVMRLoss, Representations

NAMES = ("scattering", "hog", "local_std", "dct")


def modes(
    device: torch.device, repeats: int, *, n: int = 256, d: int = 2048, size: int = 96
) -> dict[str, Any]:
    """Times loss and representations compiled and on channels-last images; measures rounding.

    Everything is compiled with ``fullgraph=True``, which fails at a graph break.

    Args:
        device: Where to run.
        repeats: Timed rounds.
        n: Batch size of the loss.
        d: Width of the embeddings.
        size: Side of the images, of which there are 32.

    Returns:
        ``times``: what -> ``"plain"``, ``"compiled"`` and, for representations,
        ``"channels last"`` -> seconds of each round. ``errors``: type of the embeddings -> relative
        error of the ``"loss"`` and of its ``"gradient"``.
    """
    ready = features(n, device, dict.fromkeys(SIZES, SKETCH_DIM))
    z, v = embeddings(n, d, device)
    criterion = MVMRLoss()
    compiled_loss = torch.compile(criterion, fullgraph=True)
    candidates = {
        "plain": step(lambda z, v: criterion(z, v, ready), z, v),
        "compiled": step(lambda z, v: compiled_loss(z, v, ready), z, v),
    }
    seconds = {"loss, five sketches": interleaved(candidates, device, repeats=repeats)}
    images = photographs(32, size, device)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for name in NAMES:
        module = Representations([name]).to(device)
        compiled = torch.compile(module, fullgraph=True)
        seconds[name] = interleaved(
            {
                "plain": lambda module=module: module(images),
                "compiled": lambda compiled=compiled: compiled(images),
                "channels last": lambda module=module: module(channels_last),
            },
            device,
            repeats=repeats,
        )

    errors = {}
    exact = criterion(z, v, ready)
    gradient = torch.autograd.grad(exact, z)[0]
    for dtype in (torch.bfloat16, torch.float16):
        half = z.detach().to(dtype).requires_grad_()
        loss = criterion(half, v.to(dtype), ready)
        rounded = torch.autograd.grad(loss, half)[0].to(gradient.dtype)
        errors[str(dtype).removeprefix("torch.")] = {
            "loss": abs(loss / exact - 1).item(),
            "gradient": ((rounded - gradient).norm() / gradient.norm()).item(),
        }
    return {"times": seconds, "errors": errors}

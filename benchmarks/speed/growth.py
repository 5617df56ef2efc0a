"""How time grows with the batch, the width, the number of representations and the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness.timing import interleaved, medians
from benchmarks.speed.losses import embeddings, features, step
from benchmarks.speed.representations import photographs
from mvmr_loss import MVMRLoss, Representations

QUESTIONS: dict[str, Sequence[int]] = {
    "batch size n (d = 2048, five sketches of 1024)": (64, 128, 256, 512, 1024, 2048, 4096),
    "width d (n = 256, five sketches of 1024)": (128, 512, 2048, 8192, 16384),
    "number of representations K (n = 256, d = 2048, width 8192)": (0, 1, 2, 4, 8),
    "image size (scattering of 8 images)": (32, 64, 96, 128, 224),
    "image size (HOG, local std and DCT of 8 images)": (32, 64, 96, 128, 224),
}


def growth(device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Times the loss and the representations over a range of sizes and fits an exponent to each.

    Args:
        device: Where to run.
        repeats: Timed rounds.

    Returns:
        Question -> ``sizes``, ``seconds`` and, where all sizes are positive, the ``exponent`` of a
        straight line through the larger half in log-log: there the fixed costs have faded.
    """
    criterion = MVMRLoss()
    results = {}
    for question, sizes in QUESTIONS.items():
        candidates = {}
        for size in sizes:
            if question.startswith("image"):
                names = ["scattering"] if "scattering" in question else ["hog", "local_std", "dct"]
                module, images = Representations(names).to(device), photographs(8, size, device)
                candidates[str(size)] = lambda module=module, images=images: module(images)
                continue
            n = size if question.startswith("batch") else 256
            d = size if question.startswith("width") else 2048
            count, width = (size, 8192) if question.startswith("number") else (5, 1024)
            ys = features(n, device, {str(k): width for k in range(count)})
            loss = lambda z, v, ys=ys: criterion(z, v, ys)  # noqa: E731
            candidates[str(size)] = step(loss, *embeddings(n, d, device))
        seconds = list(medians(interleaved(candidates, device, repeats=repeats, warmup=1)).values())
        results[question] = {"sizes": list(sizes), "seconds": seconds}
        if min(sizes) > 0:
            results[question]["exponent"] = _exponent(sizes, seconds)
    return results


def _exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    half = len(sizes) // 2
    x = torch.tensor([math.log(size) for size in sizes[half:]])
    y = torch.tensor([math.log(value) for value in seconds[half:]])
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())

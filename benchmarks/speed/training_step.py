"""Time of a whole training step with and without the representations computed in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.harness.timing import Times, interleaved
from benchmarks.speed.representations import photographs
from mvmr_loss import MVMRLoss, MVMRProjectionHead, Representations

FIVE = ("pixels", "augmented_pixels", "scattering", "hog", "local_std")


def live_representations(device: torch.device, repeats: int) -> Times:
    """Times a step of ResNet-18 on 64 images of 96 x 96 without, and with five live representations.

    Args:
        device: Where to run.
        repeats: Timed rounds.

    Returns:
        Name -> seconds of each round of a step (two forward passes, backward, optimiser).
    """
    from torchvision.models import resnet18

    torch.manual_seed(0)
    backbone = resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, MVMRProjectionHead(512, 2048, 2048)).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    criterion = MVMRLoss()
    images = photographs(64, 96, device)
    augmented = images.flip(-1)

    def step(representations: Representations | None) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            z, v = model(images), model(augmented)
            criterion(z, v, representations(images) if representations else None).backward()
            optimizer.step()

        return run

    candidates = {
        "no representations": step(None),
        "five, live": step(Representations(FIVE, normalization="none").to(device)),
        "five, live, sketched": step(
            Representations(FIVE, sketch_dim=1024, normalization="none").to(device)
        ),
    }
    for name in FIVE:
        candidates[f"{name} alone"] = step(Representations([name], normalization="none").to(device))
    return interleaved(candidates, device, repeats=repeats, warmup=1)

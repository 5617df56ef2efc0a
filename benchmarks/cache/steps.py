"""Time of a training step with the representations read from a store, computed live, or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.encoder import SmallResNet
from benchmarks.harness.timing import interleaved, medians
from benchmarks.speed.representations import photographs
from mvmr_loss import MVMRLoss, MVMRProjectionHead, Normalization, Representations

CACHEABLE = ("pixels", "scattering", "hog", "local_std")
SKETCH_DIM = 1024


def normalized(images: Tensor) -> Tensor:
    """Normalises images in [0, 1] of shape (N, 3, H, W) with ImageNet's mean and standard deviation."""
    return Normalization.imagenet().apply(images)


def store(
    folder: Path,
    images: int | Tensor,
    size: int,
    sketch_dim: int | None,
    names: Sequence[str] = CACHEABLE,
) -> Representations:
    """Returns representations with a store in ``folder``, of images or of so many of them."""
    whose = {"num_samples": images} if isinstance(images, int) else {"dataset": images}
    cache = {"path": folder, "image_shape": (3, size, size), **whose}
    return Representations(names, normalization="imagenet", sketch_dim=sketch_dim, cache=cache)


def networks() -> dict[str, Callable[[], tuple[nn.Module, int]]]:
    """Returns the name of each network -> what makes its trained part, and the size of its images."""

    def resnet() -> tuple[nn.Module, int]:
        from torchvision.models import resnet18

        backbone = resnet18()
        backbone.fc = nn.Identity()
        return nn.Sequential(backbone, MVMRProjectionHead(512, 2048, 2048)), 96

    def small() -> tuple[nn.Module, int]:
        encoder = SmallResNet()
        return nn.Sequential(encoder, MVMRProjectionHead(encoder.output_dim, 512, 512)), 32

    return {"ResNet-18, 96 x 96": resnet, "small ResNet, 32 x 32": small}


def step_times(name: str, folder: Path, repeats: int, batch_size: int = 64) -> dict[str, float]:
    """Times a training step without representations and with them read and computed.

    Args:
        name: Of :func:`networks`.
        folder: Of the store; new.
        repeats: Timed rounds.
        batch_size: Images a step.

    Returns:
        Name -> median seconds of a step (two forward passes, loss, backward, optimiser), and under
        ``"reading alone"`` of reading the four representations of a batch.
    """
    torch.manual_seed(0)
    model, size = networks()[name]()
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    criterion = MVMRLoss()
    device = torch.device("cpu")
    images = normalized(photographs(batch_size, size, device))
    augmented = images.flip(-1)
    cached = store(folder / "four", batch_size, size, SKETCH_DIM)
    five = store(folder / "five", batch_size, size, SKETCH_DIM, (*CACHEABLE, "dct"))
    indices = torch.randperm(batch_size)
    cached(images, indices)
    five(images, indices)
    random = Representations(["augmented_pixels"])
    live = Representations(CACHEABLE)

    def read() -> dict[str, Tensor]:
        return cached(images, indices)

    def step(features: Callable[[], dict[str, Tensor]] | None) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            z, z_augmented = model(images), model(augmented)
            criterion(z, z_augmented, features() if features else None).backward()
            optimizer.step()

        return run

    candidates: dict[str, Callable[[], Any]] = {
        "no representations": step(None),
        "four from the store": step(read),
        "five from the store (DCT the fifth)": step(lambda: five(images, indices)),
        "four from the store, augmented_pixels live": step(lambda: read() | random(images)),
        "four live": step(lambda: live(images)),
        "reading alone": read,
    }
    # A short step needs more rounds for a difference of a hundredth to show.
    rounds = repeats if size >= 96 else 5 * repeats
    return medians(interleaved(candidates, device, repeats=rounds, warmup=2))

"""Size and rates of a store, and how far its numbers move distances, dCor and the loss."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.cache.steps import CACHEABLE, SKETCH_DIM, normalized, store
from benchmarks.common.data import image_tensor
from benchmarks.common.photographs import Photographs
from mvmr_loss import MVMRLoss, Representations
from mvmr_loss.cache import fill
from mvmr_loss.dependence import distance_correlation, pairwise_distances
from mvmr_loss.representations import folded_sign_sketch

SKETCH_DIMS = (256, 1024, 4096)


def store_figures(size: int, count: int, folder: Path, batch_size: int = 64) -> dict[str, float]:
    """Fills a store of the four cacheable representations and reads it in random order.

    Args:
        size: Side of the images in pixels.
        count: Number of images.
        folder: Of the store; new.
        batch_size: Images a batch.

    Returns:
        ``bytes_per_100k`` images, with ``SKETCH_DIM`` numbers a representation in half precision;
        ``filled_per_second`` and ``read_per_second``, images by the clock, the files being in the
        system's memory.
    """
    images = normalized(
        torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    )
    cached = store(folder, images, size, SKETCH_DIM)
    start = time.perf_counter()
    fill(cached, images, batch_size=batch_size)
    filled = time.perf_counter() - start
    assert cached.cache is not None
    assert cached.cache.store is not None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    start, rows = time.perf_counter(), 0
    while rows < 20 * count:
        for indices in order.split(batch_size):
            cached.cache.store.read(indices)
            rows += len(indices)
    read = time.perf_counter() - start
    used = sum((folder / name).stat().st_size for name in ("rows.bin", "index.bin"))
    return {
        "bytes_per_100k": 100_000 * used / (count + 1),
        "filled_per_second": count / filled,
        "read_per_second": rows / read,
    }


def value_figures(size: int, count: int, folder: Path) -> dict[str, Any]:
    """Compares loss, dCor and distances of stored numbers with those of exact representations.

    The embeddings are a random projection of the pixels with noise, so that they depend on every
    representation.

    Args:
        size: Side of the images in pixels: tiles of photographs.
        count: Number of images, one batch.
        folder: Of the stores; new.

    Returns:
        ``loss``: the loss with exact representations, with sketches, with exact ones in half
        precision from a store, and with sketches from a store. ``distances``: representation ->
        width of the sketch -> relative error of the distances, root mean square. ``dcor``:
        likewise, the largest absolute change of dCor over seeds of the sketch.
    """
    tiles = Photographs("train")
    chosen = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))[:count]
    images, _ = image_tensor(Subset(tiles, chosen.tolist()), size)
    images = normalized(images.float() / 255)
    exact = Representations(CACHEABLE)(images)
    generator = torch.Generator().manual_seed(1)
    z = images.flatten(1) @ torch.randn(images[0].numel(), 128, generator=generator)
    z = z / z.std() + torch.randn(z.shape, generator=generator)
    v = z + 0.5 * torch.randn(z.shape, generator=generator)

    criterion, rows = MVMRLoss(), torch.arange(count)
    sketched = Representations(CACHEABLE, sketch_dim=SKETCH_DIM)(images)
    losses = {
        "exact": criterion(z, v, exact),
        "sketched": criterion(z, v, sketched),
        "exact, stored": criterion(z, v, store(folder / "a", count, size, None)(images, rows)),
        "sketched, stored": criterion(
            z, v, store(folder / "b", count, size, SKETCH_DIM)(images, rows)
        ),
    }
    pairs = torch.triu_indices(count, count, 1)
    distance_errors: dict[str, dict[str, float]] = {}
    dcor_changes: dict[str, dict[str, float]] = {}
    for name, y in exact.items():
        distances = _distances(y, pairs)
        dcor = distance_correlation(z, y)
        for dim in SKETCH_DIMS:
            sketches = [folded_sign_sketch(y, dim, seed) for seed in range(4)]
            errors = torch.stack([_distances(s, pairs) / distances - 1 for s in sketches])
            changes = [abs(distance_correlation(z, s) - dcor).item() for s in sketches]
            distance_errors.setdefault(name, {})[str(dim)] = errors.square().mean().sqrt().item()
            dcor_changes.setdefault(name, {})[str(dim)] = max(changes)
    return {
        "loss": {name: loss.item() for name, loss in losses.items()},
        "distances": distance_errors,
        "dcor": dcor_changes,
    }


def _distances(x: Tensor, pairs: Tensor) -> Tensor:
    """Returns the distances of pairs of rows in float64."""
    return pairwise_distances(x.double())[pairs[0], pairs[1]]

"""What a collection with a cache returns; a file of its own, as it imports torch's compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mvmr_loss.cache.rows import CachedRows

if TYPE_CHECKING:
    from mvmr_loss.representations.collection import Representations


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def cached_features(
    representations: Representations,
    cache: CachedRows,
    images: Tensor | None,
    indices: Tensor | Sequence[int],
) -> dict[str, Tensor]:
    """Returns the rows of the cache, and beside them what cannot be kept.

    Args:
        representations: All of them, by name.
        cache: The rows of those that are cacheable.
        images: Tensor of shape (N, C, H, W), or None.
        indices: Each image's index in the data set, shape (N,).

    Raises:
        ValueError: If an image is needed and missing.
    """
    by_name = representations.by_name
    live = [name for name, module in by_name.items() if not module.cacheable]
    if live and images is None:
        raise ValueError(
            f"images must be given but are None: {', '.join(live)} must be computed live."
        )
    features: dict[str, Tensor] = cache(images, indices)
    for name in live:
        features[name] = representations._in_slices(by_name[name], cast("Tensor", images))
    return {name: features[name] for name in by_name} if live else features

"""Representations kept on disk, of images that are known by their file names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightly.data import LightlyDataset
from torch import Tensor

from mvmr_loss.cache import CachedRepresentations, dataset_fingerprint


class KeptRepresentations:
    """Reads the representations of lightly's batches from a store, or fills it with them.

    Args:
        representations: The :class:`~mvmr_loss.Representations` that are kept.
        folder: The store.
        dataset: The training data set.
        fill: Whether the store is made if there is none.

    Raises:
        TypeError: If the data set is not a ``LightlyDataset``.
        ValueError: If the store is missing, or is of other images or settings.
        OSError: If the store is damaged.
    """

    def __init__(self, representations: Any, folder: Path, dataset: Any, *, fill: bool) -> None:
        if not isinstance(dataset, LightlyDataset):
            raise TypeError(
                "cache needs a LightlyDataset, by whose file names images are known, but the data "
                f"set is a {type(dataset).__name__}."
            )
        if not fill and not folder.exists():
            raise ValueError(
                "cache must be the folder of a store of representations but there is none at "
                f"{str(folder)!r}; set fill_cache to True to have it made and filled in the first "
                "epoch, or leave cache out."
            )
        self.index = {name: i for i, name in enumerate(dataset.get_filenames())}
        self.representations = CachedRepresentations(
            representations,
            folder,
            num_samples=len(dataset),
            fingerprint=dataset_fingerprint(dataset),
        )

    def __call__(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns name -> representations of a batch.

        Args:
            images: The non-augmented views, shape (N, C, H, W).
            names: Their file names, N of them.
        """
        values: dict[str, Tensor] = self.representations(
            images, [self.index[name] for name in names]
        )
        return values

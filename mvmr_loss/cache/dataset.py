"""Data sets whose samples have an index, what tells them apart, and filling a store from one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mvmr_loss.cache.representations import CachedRepresentations
from mvmr_loss.representations.base import check_images


class IndexedDataset(Dataset[tuple[Any, ...]]):
    """A data set whose samples begin with their index.

    Wrap the whole data set, and take subsets of the result: then a sample's index, and one store,
    serve all of them.

    Args:
        dataset: A data set with a length; samples are tuples, lists, or single values.

    Raises:
        TypeError: If the data set has no length or items.

    Examples:
        >>> from torch.utils.data import Subset
        >>> dataset = IndexedDataset([("image a", 0), ("image b", 1), ("image c", 0)])
        >>> dataset[1]
        (1, 'image b', 1)
        >>> Subset(dataset, [2, 0])[0]
        (2, 'image c', 0)
    """

    def __init__(self, dataset: Any) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                "dataset must have a length and items by index, so that samples have an index, "
                f"but is a {type(dataset).__name__}."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = self.dataset[index]
        return (index, *sample) if isinstance(sample, (tuple, list)) else (index, sample)


def dataset_fingerprint(dataset: Any) -> str:
    """Computes a short text that tells data sets apart, without running their transforms.

    It covers the length and, of what is there, the relative names of the files (torchvision's
    folders, ``LightlyDataset``, solo-learn's), the sizes of 64 of them, and 64 evenly spaced items
    of ``data`` (torchvision's CIFAR, STL10, MNIST, ...). Wrappers and subsets are looked into. Of a
    data set with none of these it covers the length alone: pass a text of one's own then.

    Args:
        dataset: A data set with a length.

    Returns:
        The length and 16 hexadecimal digits.

    Raises:
        TypeError: If the data set has no length.

    Examples:
        >>> dataset_fingerprint([1, 2, 3]) == dataset_fingerprint(IndexedDataset([4, 5, 6]))
        True
        >>> dataset_fingerprint([1, 2, 3]) == dataset_fingerprint([1, 2])
        False
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must have a length but is a {type(dataset).__name__}.")
    digest = hashlib.sha256()
    _add_identity(digest, dataset)
    return f"{len(dataset)}-{digest.hexdigest()[:16]}"


def fill(
    cached: CachedRepresentations,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Computes and stores the rows that are missing.

    Args:
        cached: What to fill.
        dataset: Gives (image, ...) or image; images are tensors of shape (C, H, W), not augmented
            and normalised as in the training.
        batch_size: Images a batch, at least 1.
        num_workers: Worker processes that load images.
        device: Where to compute.
        share: ``(k, n)``: this process is the k-th of n, counted from 0, and fills every n-th row.
        progress: Called with the number of rows done and to do, after each batch.

    Returns:
        How many rows were filled.

    Raises:
        ValueError: If the length of the data set is not the store's, or an image does not fit.
        OSError: If the store is damaged, may not be written, or the disk is full.

    Examples:
        >>> import tempfile
        >>> from mvmr_loss import Representations
        >>> images = torch.rand(10, 3, 16, 16)
        >>> representations = Representations(["pixels"])
        >>> cached = CachedRepresentations(representations, tempfile.mkdtemp(), num_samples=10)
        >>> fill(cached, images), fill(cached, images)
        (10, 0)
    """
    if len(dataset) != cached.num_samples:
        raise ValueError(
            f"dataset must have the store's {cached.num_samples} samples but has {len(dataset)}."
        )
    if cached.cache is None:
        first = IndexedDataset(dataset)[0][1]
        cached._ready(check_images(first, name="dataset[0]"))
    assert cached.cache is not None
    # By the index, not by the place among the missing: those are fewer for a process that is late.
    rows = range(share[0], cached.cache.num_samples, share[1])
    valid = cached.cache.is_valid().tolist()
    missing = [i for i in rows if not valid[i]]
    loader = DataLoader(
        IndexedDataset(dataset), batch_size, sampler=missing, num_workers=num_workers
    )
    done = 0
    for indices, images, *_ in loader:
        cached(images.to(device), indices)
        done += len(indices)
        if progress is not None:
            progress(done, len(missing))
    return done


def _add_identity(digest: Any, dataset: Any) -> None:
    """Adds to a hash what tells a data set apart."""
    inner = getattr(dataset, "dataset", None)
    indices = getattr(dataset, "indices", None)
    if inner is not None and hasattr(inner, "__len__"):
        if indices is not None:
            digest.update(" ".join(str(int(i)) for i in indices).encode())
        _add_identity(digest, inner)
        return
    digest.update(f"length {len(dataset)}\n".encode())
    for attribute in ("samples", "images"):
        files = getattr(dataset, attribute, None)
        if not isinstance(files, (list, tuple)):
            continue
        names = [f[0] if isinstance(f, (list, tuple)) else f for f in files]
        if names and all(isinstance(name, (str, os.PathLike)) for name in names):
            root = Path(getattr(dataset, "root", "."))
            for name in names:
                digest.update(os.path.relpath(root / name, root).encode() + b"\n")
            for name in _spread(names):
                digest.update(f"{os.path.getsize(root / name)}\n".encode())
            return
    data = getattr(dataset, "data", None)
    if data is not None and hasattr(data, "shape") and hasattr(data, "dtype"):
        dtype = str(data.dtype).removeprefix("torch.")
        digest.update(f"{tuple(data.shape)} {dtype}\n".encode())
        for item in _spread(data):
            digest.update(bytes(torch.as_tensor(item).flatten().view(torch.uint8).tolist()))


def _spread(items: Any) -> list[Any]:
    """Returns up to 64 evenly spaced items."""
    count = min(64, len(items))
    return [items[i * len(items) // count] for i in range(count)]

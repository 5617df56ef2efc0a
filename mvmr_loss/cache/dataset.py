"""Data sets whose samples have an index, what tells them apart, and filling a store from one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

if TYPE_CHECKING:
    from mvmr_loss.representations.collection import Representations

# A path with a part that is nothing, "." or "..".
_NOT_PLAIN = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)")


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
    folders, ``LightlyDataset``, solo-learn's; lists, arrays, records and tables with names), the sizes
    of 64 of them, and 64 evenly spaced items of arrays, tensors and lists (torchvision's CIFAR, STL10,
    MNIST, ``TensorDataset``, a class of one's own) and of Hugging Face's data sets. Wrappers, with the
    order they keep, concatenations and subsets are looked into. The working directory plays no part.
    Not seen are what a data set computes in its methods, such as an order, Pillow's images, and what a
    class of one's own holds in a mapping or in ``__slots__``: of these, give a text of your own as the
    cache's ``fingerprint``. What is read in training is compared with live features now and then, which
    sees that, too.

    Args:
        dataset: A data set with a length.

    Returns:
        The length and 16 hexadecimal digits.

    Raises:
        TypeError: If the data set has no length.

    Examples:
        >>> dataset_fingerprint([1, 2, 3]) == dataset_fingerprint(IndexedDataset([1, 2, 3]))
        True
        >>> dataset_fingerprint([1, 2, 3]) == dataset_fingerprint([1, 3, 2])
        False
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must have a length but is a {type(dataset).__name__}.")
    digest = hashlib.sha256()
    _add_identity(digest, dataset)
    return f"{len(dataset)}-{digest.hexdigest()[:16]}"


def indexed_by(dataset: Any) -> Any:
    """Returns the data set whose samples the indices of a loader's data set count.

    A subset of an :class:`IndexedDataset` gives the indices of the whole.

    Raises:
        TypeError: If the data set has no length.
        ValueError: If it joins parts with indices of their own, which are not told apart.

    Examples:
        >>> whole = IndexedDataset([1, 2, 3])
        >>> indexed_by(torch.utils.data.Subset(whole, [2])) is whole
        True
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            "cache needs a data set with a length, whose samples have an index, but it is a "
            f"{type(dataset).__name__}."
        )
    parts = {id(part): part for part in _indexed(dataset)}
    if len(parts) > 1:
        raise ValueError(
            f"the cache's data set must be indexed as a whole but has {len(parts)} parts with indices "
            "of their own; join first: IndexedDataset(ConcatDataset([...])), and take subsets of that."
        )
    return next(iter(parts.values()), dataset)


def _indexed(dataset: Any, within: tuple[Any, ...] = ()) -> list[IndexedDataset]:
    """Returns the data sets with indices that one is, wraps or joins."""
    if isinstance(dataset, IndexedDataset):
        return [dataset]
    if any(outer is dataset for outer in within):  # A part that knows its whole.
        return []
    parts = _data_sets(getattr(dataset, "datasets", None))
    if hasattr(dataset, "dataset"):
        parts = [*parts, dataset.dataset]
    return [found for part in parts for found in _indexed(part, (*within, dataset))]


def fill(
    representations: Representations,
    dataset: Any,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    on_broken: Callable[[str], None] | None = None,
) -> int:
    """Computes and stores the rows that are missing in the cache of representations.

    Args:
        representations: With a ``cache``, which learns of which data set it is.
        dataset: Gives (image, ...) or image; images are tensors of shape (C, H, W), not augmented
            and normalised as in the training. In the place of an image there may be a list of its
            views, the first of them not augmented.
        batch_size: Images a batch, at least 1.
        num_workers: Worker processes that load images.
        device: Where to compute.
        share: ``(k, n)``: this process is the k-th of n, counted from 0, and fills every n-th row.
        progress: Called with the number of rows done and to do, after each batch.
        on_broken: Called with one sentence for each image that cannot be read, which is skipped.
            None raises instead, when the rest of its batch is stored.

    Returns:
        How many rows were filled.

    Raises:
        TypeError: If samples are neither images nor begin with them.
        ValueError: If there is no cache, it is of another data set, or an image does not fit or
            cannot be read, or ``share`` is none.
        OSError: If the store is damaged, may not be written, or the disk is full.

    Examples:
        >>> import tempfile
        >>> from mvmr_loss import Representations
        >>> images = torch.rand(10, 3, 16, 16)
        >>> representations = Representations(["pixels"], cache=tempfile.mkdtemp())
        >>> fill(representations, images), fill(representations, images)
        (10, 0)
    """
    cache = representations.cache
    if cache is None:
        raise ValueError(
            "representations must have a cache to fill: Representations(..., cache=...)."
        )
    k, n = share
    if not (isinstance(k, Integral) and isinstance(n, Integral) and 0 <= k < n):
        raise ValueError(
            f"share must be (k, n), of n processes the k-th, counted from 0, but is {share!r}."
        )
    readable = _Readable(_of_images(dataset))
    representations.open_cache(dataset)
    # By the index, not by the place among the missing: those are fewer for a process that is late.
    rows = range(k, len(readable), n)
    valid = [] if cache.store is None else cache.store.is_valid().tolist()
    missing = [i for i in rows if not (valid and valid[i])]
    loader = DataLoader(
        readable,
        batch_size,
        sampler=missing,
        num_workers=num_workers,
        collate_fn=list,
    )
    done = 0
    for samples in loader:
        whole = [(i, image) for i, image in samples if not isinstance(image, _Unreadable)]
        if whole:
            representations._store(_batch(whole).to(device), [i for i, _ in whole])
        done += len(whole)
        for _, image in samples:
            if isinstance(image, _Unreadable):
                if on_broken is None:
                    raise ValueError(image)
                on_broken(image)
        if progress is not None:
            progress(done, len(missing))
    return done


def _of_images(dataset: Any) -> Any:
    """Returns the data set behind an index, whose samples the store's rows are."""
    dataset = indexed_by(dataset)
    return dataset.dataset if isinstance(dataset, IndexedDataset) else dataset


def _batch(samples: list[tuple[int, Any]]) -> torch.Tensor:
    """Returns the images of samples (index, image) as a batch after checking them."""
    first, like = samples[0]
    for i, image in samples:
        if not (hasattr(image, "shape") and hasattr(image, "dtype")):
            keys = f" of {', '.join(map(repr, image))}" if isinstance(image, Mapping) else ""
            raise TypeError(
                "samples of the data set must be (image, ...) or image, or have a list of views in "
                "the image's place, with images as tensors of shape (C, H, W), but that of sample "
                f"{i} is a {type(image).__name__}{keys}; give a data set that takes the image out, as "
                "a tensor."
            )
        if image.shape != like.shape:
            raise ValueError(
                f"images of the data set must be of one shape but image {i} has {tuple(image.shape)} "
                f"and image {first} {tuple(like.shape)}; resize or crop them."
            )
    batch: torch.Tensor = default_collate([image for _, image in samples])
    return batch


class _Unreadable(str):
    """Why an image cannot be read."""


class _Readable(IndexedDataset):
    """Gives index and image, or index and a sentence where the image cannot be read."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        try:
            _, *image = super().__getitem__(index)
            while isinstance(image, (tuple, list)) and image:  # Of several views the first.
                image = image[0]
            return index, image
        except Exception as error:  # Pillow raises whatever a damaged file leads to.
            samples = getattr(self.dataset, "samples", None)
            name = f" ({samples[index][0]})" if isinstance(samples, list) else ""
            why = f"image {index}{name} cannot be read: {str(error) or repr(error)}"
            return index, _Unreadable(why)


def _add_identity(digest: Any, dataset: Any, within: tuple[Any, ...] = ()) -> None:
    """Adds to a hash what tells a data set apart."""
    if any(outer is dataset for outer in within):  # A part that knows its whole.
        return
    attributes = dict(sorted(getattr(dataset, "__dict__", {}).items()))
    parts = [part for value in attributes.values() for part in _data_sets(value)]
    inner = getattr(dataset, "dataset", None)
    if not parts and hasattr(inner, "__len__"):
        parts = [inner]
    # What a wrapper selects or reorders by: Subset's indices, an order, a permutation. Not the
    # settings of a transform: they are no part of what the data set holds.
    as_long = [
        value
        for name, value in attributes.items()
        if name != "dataset" and _is_sequence(value) and len(value) == len(dataset)
    ]
    root = getattr(dataset, "root", None)
    if parts:
        for value in as_long:
            if not any(value is part for part in parts):
                _add_values(digest, value)
        for part in parts:
            _add_identity(digest, part, (*within, dataset))
        return
    digest.update(f"length {len(dataset)}\n".encode())
    if _is_arrow(dataset):  # Undecoded, and in the order of its indices.
        rows = dataset.with_format("arrow")
        for k in _spread(range(len(dataset))):
            digest.update(repr(rows[k].to_pydict()).encode())
        return
    for name in ("samples", "images", "data", "tensors"):
        value = getattr(dataset, name, None)
        if value is not None and _is_sequence(value) and len(value):
            _add_values(digest, value, root)
            return
    for value in [dataset] if _is_sequence(dataset) else as_long:
        _add_values(digest, value, root)


def _data_sets(value: Any) -> list[Any]:
    """Returns the data sets that an attribute is or holds."""
    if isinstance(value, Dataset) or _is_arrow(value):
        return [value] if hasattr(value, "__len__") else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 1000:
        found = [_data_sets(item) for item in value]
        return [part for parts in found for part in parts] if all(found) else []
    return []


def _is_arrow(value: Any) -> bool:
    """Tells whether a value is a data set of Hugging Face's library."""
    return hasattr(value, "with_format") and hasattr(value, "column_names")


def _is_sequence(value: Any) -> bool:
    """Tells whether a value holds items: a list, tuple, range, array, tensor or table."""
    array = hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape) > 0
    return array or isinstance(value, (list, tuple, range)) or _is_table(value)


def _is_table(value: Any) -> bool:
    """Tells whether a value is a table of pandas'."""
    return hasattr(value, "columns") and hasattr(value, "to_dict")


def _add_values(digest: Any, values: Any, root: Any = None) -> None:
    """Adds names, numbers and texts, all of them, or evenly spaced items of what is larger."""
    if _is_table(values):
        values = values.to_dict("records")
    elif hasattr(values, "to_numpy"):  # A column of pandas', whose items go by its labels.
        values = values.to_numpy()
    kind = str(getattr(values, "dtype", "")).removeprefix("torch.")
    if kind.startswith(("<U", ">U", "object", "str")):
        values = values.tolist()
    elif kind and (len(values.shape) > 1 or not kind.startswith(("int", "uint"))):
        digest.update(f"{tuple(values.shape)} {kind}\n".encode())
        for item in _spread(values):
            digest.update(_bytes(item))
        return
    elif kind:
        values = values.tolist()
    if values and all(isinstance(v, (str, os.PathLike)) for v in values):
        _add_names(digest, [os.fspath(name) for name in values], root)
    elif all(v is None or isinstance(v, (int, float)) for v in values):
        digest.update(" ".join(map(repr, values)).encode() + b"\n")
    elif columns := _columns(values):
        named = [c for c in columns if all(isinstance(v, (str, os.PathLike)) for v in c)]
        # A file's label does not change its features, and names differ more than labels.
        named = [max(named, key=lambda column: len(set(column)))] if named else []
        for column in named or columns:
            _add_values(digest, column, root)
    else:
        for item in values if isinstance(values, tuple) else _spread(values):
            if isinstance(item, Mapping) or dataclasses.is_dataclass(item):
                item = list((item if isinstance(item, Mapping) else vars(item)).values())
            if _is_sequence(item):
                _add_values(digest, item, root)
            elif isinstance(item, (str, bytes, int, float)):
                digest.update(f"{item!r}\n".encode())


def _bytes(item: Any) -> bytes:
    """Returns what an item of an array holds."""
    if isinstance(item, torch.Tensor) and item.is_sparse:
        item = item.to_dense()
    try:
        data = torch.as_tensor(item).detach().cpu().contiguous().flatten().view(torch.uint8)
    except (TypeError, ValueError, RuntimeError):  # Bytes, dates or structures.
        return repr(item.tolist() if hasattr(item, "tolist") else item).encode()
    return bytes(data.tolist())


def _columns(values: Any) -> list[list[Any]]:
    """Returns the columns of records: of tuples of one length, or of mappings with the same keys."""
    first = values[0]
    if all(isinstance(v, Mapping) and v.keys() == first.keys() for v in values):
        return [[v[key] for v in values] for key in first]
    if len(values) > 1 and all(
        isinstance(v, (list, tuple)) and len(v) == len(first) for v in values
    ):
        return [list(column) for column in zip(*values, strict=True)]
    return []


def _add_names(digest: Any, names: list[str], root: Any) -> None:
    """Adds names relative to their folder, whatever the working directory, and 64 files' sizes."""
    if not isinstance(root, (str, os.PathLike)):
        if len({os.path.isabs(name) for name in names}) > 1:
            names = [os.path.abspath(name) for name in names]
        try:
            root = os.path.commonpath([os.path.dirname(name) for name in names])
        except ValueError:  # Of several drives, or there are none.
            root = ""
    within = os.path.join(root, "")
    for name in names:
        relative = name.removeprefix(within)
        # Most names begin with the root and are plain: of those the rest is what is asked for below.
        if not root or relative is name or _NOT_PLAIN.search(relative):
            # torchvision's names begin with the root, solo-learn's are below it.
            inside = Path(name).is_relative_to(root) or os.path.isabs(name)
            relative = os.path.relpath(name, root or ".") if inside and name else name
        digest.update(relative.encode() + b"\n")
    for name in _spread(names):
        for file in (Path(name), Path(root) / name):
            if file.is_file():
                digest.update(f"{file.stat().st_size}\n".encode())
                break


def _spread(items: Any) -> list[Any]:
    """Returns up to 64 evenly spaced items."""
    count = min(64, len(items))
    return [items[i * len(items) // count] for i in range(count)]

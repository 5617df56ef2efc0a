"""Representations computed once per image, kept on disk, and read back by sample index.

A representation of the non-augmented view never changes during training.
:class:`CachedRepresentations` computes each image's once, during the first epoch or ahead of the
training with ::

    python -m mvmr_loss.representations.cache fill STORE --data FOLDER --image-size 96 \
        --representations pixels scattering hog local_std --sketch-dim 1024

and reads it back afterwards. ``verify STORE`` checks every row, ``info STORE`` tells what is in it.

A store is a folder of three files and a lock:

========================  ==========================================================================
``metadata.json``         what the columns are, of which images, and a checksum of all this
``rows.bin``              a row per sample: a block of numbers per representation; one row more than
                          samples, which holds the representations of a fixed test image
``index.bin``             8 bytes per row: 0 where the row is missing, else a mark and the CRC-32 of
                          the row, started from its number
========================  ==========================================================================

A row's entry in the index is written after the row itself is on disk, so a row is whole or missing,
whenever a process is killed; and every row that is read is compared with its checksum. Nothing is
unpickled.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import inspect
import json
import mmap
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mvmr_loss._checks import check_float_tensor
from mvmr_loss._version import __version__
from mvmr_loss.representations.base import Representation, check_images
from mvmr_loss.representations.registry import Representations

_FORMAT = 1
_MARK = 0x4D564D52 << 32  # "MVMR", the upper half of the entry of a row that is there
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_FILES = ("metadata.json", "metadata.json.new", "rows.bin", "index.bin", "lock")
# Rounding to half precision and another device's arithmetic stay below 1%; other normalisations,
# options, weights or images are far above.
_TOLERANCE = 0.03


class CorruptCacheError(OSError):
    """Files of a store are truncated or damaged."""


class RepresentationCache:
    """A store of fixed features on disk: a row per sample, a block of columns per representation.

    This opens an existing store; :meth:`create` makes one. Reading maps the files into memory,
    which all processes share, so a store may be larger than memory. The object may be pickled and
    forked, as loader workers do: what travels is the path.

    Any number of processes may read and write one store at once. A row that is there is never
    written again.

    Args:
        path: Folder of the store.

    Attributes:
        path: Folder of the store.
        num_samples: Number of rows.
        widths: Name of each representation -> how many numbers it has.
        dtype: Type of the stored numbers.
        settings: What the store's maker said of its contents, see :meth:`create`.
        writable: Whether this process may write to it.

    Raises:
        FileNotFoundError: If there is no store at ``path``.
        CorruptCacheError: If a file is damaged or truncated.
        ValueError: If the store is of another format or byte order.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> store = RepresentationCache.create(folder, {"pixels": 4}, num_samples=100)
        >>> store.write([7, 3], {"pixels": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])})
        >>> store.read([3])["pixels"]
        tensor([[5., 6., 7., 8.]])
        >>> store.is_valid().nonzero().flatten()
        tensor([3, 7])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        metadata = _read_metadata(self.path)
        self.num_samples: int = metadata["num_samples"]
        self.widths: dict[str, int] = metadata["widths"]
        self.dtype = _DTYPES[metadata["dtype"]]
        self.settings: dict[str, Any] = metadata["settings"]
        self.made_by: str = metadata["made_by"]
        self._row_bytes = sum(self.widths.values()) * self.dtype.itemsize
        self._rows, self._rows_file, self.writable = self._open("rows.bin", self._row_bytes)
        self._index, self._index_file, writable = self._open("index.bin", 8)
        self.writable &= writable and os.access(self.path / "lock", os.W_OK)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        widths: Mapping[str, int],
        num_samples: int,
        *,
        dtype: torch.dtype = torch.float16,
        settings: Mapping[str, Any] | None = None,
    ) -> RepresentationCache:
        """Creates a store, or opens the one there if it was created with the same arguments.

        The space is reserved at once, so a disk that is too small is found out here.

        Args:
            path: Folder of the store: new, empty, or a store already.
            widths: Name of each representation -> how many numbers it has.
            num_samples: Number of samples of the data set.
            dtype: torch.float16 (the default), torch.bfloat16 or torch.float32.
            settings: What the contents depend on, as JSON can write it.

        Returns:
            The open store.

        Raises:
            ValueError: If an argument is out of range, the folder holds something else, or the
                store there was created with other arguments.
            OSError: If the disk is too full or the folder may not be written.
        """
        path = Path(path)
        if dtype not in _DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)} but is {dtype}.")
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be an int of at least 1 but is {num_samples!r}.")
        if not widths or min(widths.values()) < 1:
            raise ValueError(
                f"widths must name representations of at least 1 number each but is {widths}."
            )
        content = {
            "num_samples": num_samples,
            "widths": dict(widths),
            "dtype": str(dtype).removeprefix("torch."),
            # As it reads back from the file: tuples as lists, keys as strings.
            "settings": json.loads(json.dumps(dict(settings or {}))),
        }
        if (path / "metadata.json").exists():
            return cls._open_same(path, content)
        try:
            path.mkdir(parents=True, exist_ok=True)
            strange = sorted(p.name for p in path.iterdir() if p.name not in _FILES)
            if strange:
                raise ValueError(
                    f"path must be a new or empty folder or a store but {path} holds "
                    f"{strange[0]!r}."
                )
            with _locked(path):
                if (path / "metadata.json").exists():  # Another process was faster.
                    return cls._open_same(path, content)
                row_bytes = sum(widths.values()) * dtype.itemsize
                _reserve(path, {"rows.bin": row_bytes, "index.bin": 8}, num_samples + 1)
                _write_metadata(path, content)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise PermissionError(
                    error.errno,
                    f"the store at {path} cannot be created because the folder may not be written; "
                    "choose another folder or change its permissions",
                ) from error
            raise
        return cls(path)

    @classmethod
    def _open_same(cls, path: Path, content: Mapping[str, Any]) -> RepresentationCache:
        """Opens a store after checking that it is of the same contents."""
        cache = cls(path)
        there = _read_metadata(path)
        difference = _difference(content, {key: there[key] for key in content})
        if difference is not None:
            where, wanted, found = difference
            raise ValueError(
                f"the store at {path} is of other settings: {where} is {found} there but {wanted} "
                "here; use the same settings, or another folder for the new ones."
            )
        return cache

    def _open(self, name: str, row_bytes: int) -> tuple[mmap.mmap, int, bool]:
        """Maps one file after checking its size; returns map, descriptor and if it is writable."""
        file, writable = self.path / name, True
        try:
            try:
                descriptor = os.open(file, os.O_RDWR)
            except PermissionError:
                descriptor, writable = os.open(file, os.O_RDONLY), False
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                descriptor, writable = os.open(file, os.O_RDONLY), False
        except FileNotFoundError:
            raise CorruptCacheError(
                f"the store at {self.path} has no {name}; delete the folder and fill it again."
            ) from None
        try:
            self._check_size(name, descriptor, row_bytes)
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), descriptor, writable
        except BaseException:
            os.close(descriptor)
            raise

    def _check_size(self, name: str, descriptor: int, row_bytes: int) -> None:
        """Raises if a file has not its size: reading a map beyond its file kills the process."""
        size, expected = os.fstat(descriptor).st_size, row_bytes * (self.num_samples + 1)
        if size != expected:
            raise CorruptCacheError(
                f"{self.path / name} must have {expected} bytes but has {size}: the store is "
                "truncated or damaged; delete the folder and fill it again."
            )

    def __getstate__(self) -> dict[str, str]:
        return {"path": str(self.path)}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __del__(self) -> None:
        for name in ("_rows_file", "_index_file"):
            if name in self.__dict__:
                with contextlib.suppress(OSError):
                    os.close(self.__dict__.pop(name))

    def __repr__(self) -> str:
        return f"RepresentationCache({str(self.path)!r}, {self.num_samples} x {self.widths})"

    def is_valid(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Tells which rows are there.

        Args:
            indices: Sample indices of shape (N,); None means all.

        Returns:
            Boolean tensor of shape (N,) or (num_samples,), on the CPU.

        Raises:
            TypeError: If the indices are not integers.
            ValueError: If an index is out of range.
            CorruptCacheError: If the index file was truncated meanwhile.
        """
        self._check_size("index.bin", self._index_file, 8)
        if indices is None:
            entries = bytearray(self._index[: 8 * self.num_samples])
            return torch.frombuffer(entries, dtype=torch.int64) != 0
        return torch.tensor([self._entry(i) != 0 for i in self._checked(indices)], dtype=torch.bool)

    def read(
        self,
        indices: Tensor | Sequence[int],
        names: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Reads rows and compares each with its checksum.

        Args:
            indices: Sample indices of shape (N,), in any order, also repeated.
            names: Which representations to return; None means all.
            device: Where the result shall be. To an accelerator, the rows are copied in the stored
                precision from pinned memory, without waiting.

        Returns:
            Name -> tensor of shape (N, D_k), float32.

        Raises:
            TypeError: If the indices are not integers.
            ValueError: If an index is out of range, a row is missing, or a name is unknown.
            CorruptCacheError: If a row does not match its checksum.
        """
        names = list(self.widths) if names is None else names
        for name in names:
            if name not in self.widths:
                raise ValueError(f"names must be among {list(self.widths)} but has {name!r}.")
        rows = self._read_rows(self._checked(indices))
        if device is not None and torch.device(device).type != "cpu":
            pinned = rows.pin_memory() if torch.device(device).type == "cuda" else rows
            rows = pinned.to(device, non_blocking=True)
        blocks = dict(zip(self.widths, rows.split(list(self.widths.values()), dim=1), strict=True))
        return {name: blocks[name].float() for name in names}

    def write(self, indices: Tensor | Sequence[int], features: Mapping[str, Tensor]) -> None:
        """Writes rows, and marks them valid when their data has reached the disk.

        Rows that are there already are left as they are.

        Args:
            indices: Sample indices of shape (N,).
            features: Name -> tensor of shape (N, D_k), for every representation of the store.

        Raises:
            TypeError: If the indices are not integers or the features not floating-point tensors.
            ValueError: If an index is out of range, a name or shape does not fit, or a value is not
                finite in the type of the store.
            OSError: If the store may not be written or the disk is full.
        """
        self._write_rows(self._checked(indices), features)

    def verify(
        self, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[int]:
        """Compares every row that is there with its checksum.

        Args:
            repair: If True, damaged rows are marked missing, so that they are computed again.
            progress: Called with the number of rows done and of all rows, now and then.

        Returns:
            The indices of the damaged rows; the row of the test image is ``num_samples``.

        Raises:
            CorruptCacheError: If a file was truncated meanwhile.
            PermissionError: If ``repair`` is asked for and the store may not be written.
        """
        damaged = []
        for start in range(0, self.num_samples + 1, 1024):
            for i in range(start, min(start + 1024, self.num_samples + 1)):
                if self._entry(i):
                    try:
                        self._read_rows([i])
                    except CorruptCacheError:
                        self._check_size("rows.bin", self._rows_file, self._row_bytes)
                        damaged.append(i)
            if progress is not None:
                progress(min(start + 1024, self.num_samples + 1), self.num_samples + 1)
        if repair and damaged:
            self._check_writable()
            with _locked(self.path):
                for i in damaged:
                    os.pwrite(self._index_file, bytes(8), 8 * i)
                os.fsync(self._index_file)
        return damaged

    def _checked(self, indices: Tensor | Sequence[int]) -> list[int]:
        """Returns sample indices as a list after checking them."""
        if isinstance(indices, Tensor):
            if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
                raise TypeError(f"indices must be integers but have dtype {indices.dtype}.")
            if indices.ndim != 1:
                raise ValueError(f"indices must have shape (N,) but have {tuple(indices.shape)}.")
            listed = indices.tolist()
        else:
            listed = list(indices)
            if any(isinstance(i, bool) or not isinstance(i, int) for i in listed):
                raise TypeError("indices must be integers but are not all.")
        if not listed:
            raise ValueError("indices must not be empty.")
        if min(listed) < 0 or max(listed) >= self.num_samples:
            raise ValueError(
                f"indices must be from 0 to {self.num_samples - 1}, the store's number of samples "
                f"less 1, but reach from {min(listed)} to {max(listed)}; "
                "the store belongs to another data set or split."
            )
        return listed

    def _entry(self, i: int) -> int:
        """Returns a row's entry in the index."""
        return int.from_bytes(self._index[8 * i : 8 * i + 8], sys.byteorder)

    def _read_rows(self, indices: Sequence[int]) -> Tensor:
        """Returns rows in the stored type, shape (N, D of all), after comparing the checksums."""
        self._check_size("rows.bin", self._rows_file, self._row_bytes)
        self._check_size("index.bin", self._index_file, 8)
        size = self._row_bytes
        data = bytearray(len(indices) * size)
        # Each row is copied once, and the checksum is that of the copy.
        copies, rows = memoryview(data), memoryview(self._rows)
        for k, i in enumerate(indices):
            entry = self._entry(i)
            if entry == 0:
                missing = sum(self._entry(j) == 0 for j in indices)
                raise ValueError(
                    f"indices must be of rows that are in the store at {self.path} but "
                    f"{missing} of {len(indices)} are missing, the first of them {i}; "
                    "fill the store first."
                )
            row = copies[k * size : (k + 1) * size]
            row[:] = rows[i * size : (i + 1) * size]
            if entry != _MARK | zlib.crc32(row, i & 0xFFFFFFFF):
                raise CorruptCacheError(
                    f"row {i} of the store at {self.path} does not match its checksum: the file is "
                    "damaged; `python -m mvmr_loss.representations.cache verify --repair "
                    f"{self.path}` marks such rows as missing, so that they are computed again."
                )
        return torch.frombuffer(data, dtype=self.dtype).view(len(indices), -1)

    def _write_rows(self, indices: Sequence[int], features: Mapping[str, Tensor]) -> None:
        """Writes rows of checked indices."""
        self._check_writable()
        data = memoryview(self._as_bytes(len(indices), features))
        size = self._row_bytes
        with _locked(self.path):
            self._check_size("rows.bin", self._rows_file, size)
            self._check_size("index.bin", self._index_file, 8)
            # A valid row may be being read: it stays as it is. Of a repeated index the last counts.
            new = {i: k for k, i in enumerate(indices) if self._entry(i) == 0}
            if not new:
                return
            try:
                for i, k in new.items():
                    _write_all(self._rows_file, data[k * size : (k + 1) * size], i * size)
                os.fsync(self._rows_file)
                for i, k in new.items():
                    checksum = zlib.crc32(data[k * size : (k + 1) * size], i & 0xFFFFFFFF)
                    entry = (_MARK | checksum).to_bytes(8, sys.byteorder)
                    _write_all(self._index_file, memoryview(entry), 8 * i)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"rows of the store at {self.path} could not be written ({error.strerror}); "
                    "those written so far are kept",
                ) from error

    def _as_bytes(self, count: int, features: Mapping[str, Tensor]) -> bytearray:
        """Returns the rows of features as bytes after checking them."""
        if set(features) != set(self.widths):
            raise ValueError(
                f"features must be of {sorted(self.widths)}, as the store's, "
                f"but are of {sorted(features)}."
            )
        blocks = []
        for name, width in self.widths.items():
            block = check_float_tensor(f"features[{name!r}]", features[name]).detach()
            if block.shape != (count, width):
                raise ValueError(
                    f"features[{name!r}] must have shape {(count, width)} "
                    f"but has shape {tuple(block.shape)}."
                )
            block = block.to("cpu", self.dtype)
            if not bool(torch.isfinite(block).all()):
                largest = features[name].detach().abs().max().item()
                raise ValueError(
                    f"features[{name!r}] must be finite in {self.dtype}, the store's type, but "
                    f"reach {largest:.3g}; check the images, or use a store of dtype float32."
                )
            blocks.append(block)
        data = bytearray(count * self._row_bytes)
        torch.cat(blocks, dim=1, out=torch.frombuffer(data, dtype=self.dtype).view(count, -1))
        return data

    def _check_writable(self) -> None:
        """Raises if this process may not write to the store."""
        if not self.writable:
            raise PermissionError(
                errno.EACCES,
                f"the store at {self.path} may not be written; change its permissions, "
                "or fill a copy in another folder",
            )


class CachedRepresentations(nn.Module):
    """Representations that are computed once per image and then read back by sample index.

    Called with images and their indices in the data set. Rows that are in the store are read;
    missing ones are computed from the images and stored, so the first epoch fills the store; what
    is not cacheable, like ``augmented_pixels``, is computed live. All values of cacheable
    representations come from the store, rounded to its type, also when they were just computed.

    Two checks guard against features of other images or settings. The store holds the
    representations of a fixed test image, which must be what ``representations`` computes now:
    other options, weights or versions are found out. And the first row read in each process is
    compared with a live one: so are another normalisation, another data set, or a view that is not
    the same in every epoch.

    Args:
        representations: What to compute and store. None reads what is in the store at ``path``,
            without any network or computation.
        path: Folder of the store; created at the first call if there is none.
        num_samples: Number of samples of the data set. Needed unless ``representations`` is None.
        image_shape: Channels, height and width of the images. None means the first batch's.
        fingerprint: Of the data set, see :func:`dataset_fingerprint`; any string will do. A store
            of another fingerprint is refused.
        normalization: Mean and standard deviation per channel that the images are normalised with,
            kept in the metadata; a store of another normalisation is refused.
        dtype: Type of the stored numbers: torch.float16, torch.bfloat16 or torch.float32.

    Attributes:
        cache: The store, or None before the first call made it.

    Raises:
        TypeError: If ``representations`` is not a Representations.
        ValueError: If an argument is missing, nothing is cacheable, or the store is of other
            settings.
        OSError: If the store is damaged, or the disk is full or may not be written.

    Examples:
        >>> import tempfile
        >>> images = torch.rand(8, 3, 32, 32)
        >>> representations = Representations(["pixels", "local_std"], sketch_dim=1024)
        >>> cached = CachedRepresentations(representations, tempfile.mkdtemp(), num_samples=8)
        >>> computed = cached(images, torch.arange(8))
        >>> read = cached(None, torch.tensor([2, 5]))
        >>> {name: tuple(y.shape) for name, y in read.items()}
        {'pixels': (2, 1024), 'local_std': (2, 1024)}
        >>> torch.equal(read["pixels"], computed["pixels"][[2, 5]])
        True
    """

    def __init__(
        self,
        representations: Representations | None,
        path: str | os.PathLike[str],
        *,
        num_samples: int | None = None,
        image_shape: Sequence[int] | None = None,
        fingerprint: str | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.num_samples, self.fingerprint, self.dtype = num_samples, fingerprint, dtype
        self.normalization = None if normalization is None else [list(v) for v in normalization]
        self.cache: RepresentationCache | None = None
        self.stored: Representations | None = None
        self.live: Representations | None = None
        self._compared = False
        if representations is None:
            self.cache = RepresentationCache(self.path)
            self._names = list(self.cache.widths)
            self._check_identity(self.cache)
            return
        if not isinstance(representations, Representations):
            raise TypeError(
                "representations must be a mvmr_loss.Representations or None "
                f"but is a {type(representations).__name__}."
            )
        if num_samples is None:
            raise ValueError("num_samples must be given: the number of samples of the data set.")
        self._names = list(representations.by_name)
        self.stored = _part(representations, cacheable=True)
        self.live = _part(representations, cacheable=False)
        if self.stored is None:
            raise ValueError(
                f"representations must have one that is cacheable but {', '.join(self._names)} "
                "change from call to call; compute them without a cache."
            )
        if image_shape is not None:
            self._connect(tuple(image_shape))
        elif (self.path / "metadata.json").exists():
            shape = RepresentationCache(self.path).settings.get("image_shape")
            if shape is not None:
                self._connect(tuple(shape))

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def forward(self, images: Tensor | None, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Reads or computes every representation of a batch.

        Args:
            images: The non-augmented images of shape (N, C, H, W). None is enough where all rows
                are in the store and all representations are cacheable.
            indices: Each image's index in the data set, shape (N,). Best on the CPU: on an
                accelerator, reading them makes the host wait for it.

        Returns:
            Name -> tensor of shape (N, D_k), float32, on the device of the images (of the indices,
            without images).

        Raises:
            TypeError: If the images are no floating-point tensor or the indices no integers.
            ValueError: If images are needed and missing, shapes do not fit, an index is out of
                range, or the store does not belong to these images or representations.
            OSError: If the store is damaged, may not be written, or the disk is full.
        """
        if images is not None:
            images = check_images(images)
            if len(images) != len(indices):
                raise ValueError(
                    f"images and indices must be of the same number but are {len(images)} and "
                    f"{len(indices)}."
                )
        cache = self._ready(images)
        listed = cache._checked(indices)
        missing = {i: k for k, i in enumerate(listed) if not cache._entry(i)}
        if images is None and (missing or self.live is not None):
            what = (
                f"{len(missing)} of {len(listed)} rows are missing in the store at {self.path}, "
                f"the first of them {next(iter(missing))}"
                if missing
                else f"{', '.join(self.live.by_name) if self.live else ''} must be computed live"
            )
            raise ValueError(f"images must be given but are None: {what}.")
        if missing:
            if self.stored is None:
                raise ValueError(
                    f"the store at {self.path} must have all rows when it is opened without "
                    f"representations but lacks {len(missing)} of {len(listed)}; fill it first."
                )
            assert images is not None
            with torch.no_grad():
                cache._check_writable()
                cache.write(list(missing), self.stored(images[list(missing.values())]))
        if images is not None:
            device = images.device
        else:
            device = indices.device if isinstance(indices, Tensor) else torch.device("cpu")
        features = cache.read(listed, device=device)
        if images is not None and self.stored is not None:
            self._compare_once(images, listed, features, missing)
        if self.live is not None:
            assert images is not None
            features |= self.live(images)
        return {name: features[name] for name in self._names}

    def _ready(self, images: Tensor | None) -> RepresentationCache:
        """Returns the store, made for the first batch's images if need be."""
        if self.cache is None:
            if images is None:
                raise ValueError(
                    f"images must be given but are None: there is no store at {self.path} yet."
                )
            self._connect(tuple(images.shape[1:]), images.device)
        assert self.cache is not None
        shape = self.cache.settings.get("image_shape")
        if images is not None and shape is not None and list(images.shape[1:]) != shape:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, shape))}), as those of the store "
                f"at {self.path}, but have {tuple(images.shape)}."
            )
        return self.cache

    def _connect(self, image_shape: tuple[int, ...], device: torch.device | None = None) -> None:
        """Creates or opens the store, and compares the representations of the test image."""
        assert self.stored is not None
        assert self.num_samples is not None
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W) but is {image_shape}.")
        cache = RepresentationCache.create(
            self.path,
            self.stored.sizes(*image_shape),
            self.num_samples,
            dtype=self.dtype,
            settings={
                "representations": {
                    name: _describe(module) for name, module in self.stored.by_name.items()
                },
                "image_shape": image_shape,
                "normalization": self.normalization,
                "fingerprint": self.fingerprint,
            },
        )
        if device is None:
            device = next((b.device for b in self.stored.buffers()), torch.device("cpu"))
        with torch.no_grad():
            computed = self.stored(_test_image(*image_shape).to(device))
        expected = {name: values.cpu() for name, values in computed.items()}
        row = self.num_samples
        if not cache._entry(row):
            cache._write_rows([row], expected)
        found = cache._read_rows([row]).float().split(list(cache.widths.values()), dim=1)
        for name, values in zip(cache.widths, found, strict=True):
            error = _relative_error(values, expected[name])
            if error > _TOLERANCE:
                raise ValueError(
                    f"{name!r} in the store at {self.path} was computed by something else: for the "
                    f"test image it differs by {error:.0%} from what is computed now (other "
                    f"weights, options or version: made by {cache.made_by}, this is mvmr_loss "
                    f"{__version__}); use the same, or another folder."
                )
        self.cache = cache

    def _check_identity(self, cache: RepresentationCache) -> None:
        """Compares what was said of the data with an open store."""
        said = {
            "num_samples": (self.num_samples, cache.num_samples),
            "fingerprint": (self.fingerprint, cache.settings.get("fingerprint")),
            "normalization": (self.normalization, cache.settings.get("normalization")),
        }
        for name, (here, there) in said.items():
            if here is not None and here != there:
                raise ValueError(
                    f"the store at {self.path} is of other settings: {name} is {there} there but "
                    f"{here} here; use the same data and settings, or another folder."
                )

    def _compare_once(
        self,
        images: Tensor,
        indices: Sequence[int],
        features: Mapping[str, Tensor],
        computed: Mapping[int, int],
    ) -> None:
        """Compares the first row that was read, not computed, in this process with a live one."""
        k = next((k for k, i in enumerate(indices) if i not in computed), None)
        if self._compared or k is None:
            return
        assert self.stored is not None
        with torch.no_grad():
            live = self.stored(images[k : k + 1])
        for name, values in live.items():
            error = _relative_error(features[name][k : k + 1], values)
            if error > _TOLERANCE:
                raise ValueError(
                    f"row {indices[k]} of the store at {self.path} is not of this image: {name!r} "
                    f"differs by {error:.0%}; the images must be the same in every epoch (not "
                    "augmented), of the same data set, in the same order and normalised alike."
                )
        self._compared = True


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


def _part(representations: Representations, *, cacheable: bool) -> Representations | None:
    """Returns the representations that are cacheable, or those that are not."""
    chosen = {
        name: module
        for name, module in representations.by_name.items()
        if isinstance(module, Representation) and module.cacheable == cacheable
    }
    return Representations(chosen, slice_size=representations.slice_size) if chosen else None


def _describe(value: Any) -> Any:
    """Returns a representation's class and options, or an option, as JSON can write it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, Representation):
        options = {
            name: _describe(getattr(value, name))
            for name in inspect.signature(type(value)).parameters
            if hasattr(value, name)
        }
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **options}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _difference(a: Any, b: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first place where two JSON values differ, and both values there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            if (key in a) != (key in b):
                return where or "content", sorted(a), sorted(b)
            difference = _difference(a[key], b[key], f"{where}.{key}" if where else key)
            if difference is not None:
                return difference
        # The order of columns is the order of bytes.
        return None if list(a) == list(b) or where != "widths" else (where, list(a), list(b))
    return None if a == b else (where, a, b)


def _test_image(channels: int, height: int, width: int) -> Tensor:
    """Returns one image, shape (1, C, H, W), of waves of several lengths and directions.

    Its values are from 0 to 1, which is within the pixels' range for any usual normalisation.
    """
    c, y, x = torch.meshgrid(
        torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij"
    )
    waves = (
        torch.sin(0.11 * (c + 1) * y + 0.23 * x)
        + 0.7 * torch.sin(0.7 * y - 0.9 * (c + 1) * x)
        + 0.5 * torch.sin(0.01 * x * y + c)
    )
    return (0.5 + waves / 4.4)[None]


def _relative_error(a: Tensor, b: Tensor) -> float:
    """Returns the norm of the difference over the norm of ``b``."""
    difference, norm = (a - b).norm().item(), b.norm().item()
    return difference / norm if norm > 0 else float(difference > 0)


def _read_metadata(path: Path) -> dict[str, Any]:
    """Reads and checks a store's metadata."""
    file = path / "metadata.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        version = content["format"]
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            errno.ENOENT, f"there is no store at {path}; create and fill it first", str(path)
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        checksum = version = content = None
    if content is not None and version != _FORMAT:
        raise ValueError(
            f"the store at {path} must be of format {_FORMAT} but is of format {version}, of "
            "another version of mvmr_loss; fill a new one."
        )
    if content is None or checksum != _json_checksum(content):
        raise CorruptCacheError(f"{file} is damaged; delete the folder {path} and fill it again.")
    if content["byteorder"] != sys.byteorder:
        raise ValueError(
            f"the store at {path} must be of {sys.byteorder}-endian numbers but is of "
            f"{content['byteorder']}-endian ones; fill it on this kind of machine."
        )
    metadata: dict[str, Any] = content
    return metadata


def _write_metadata(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a store's metadata, which makes it a store."""
    full = {
        "format": _FORMAT,
        "made_by": f"mvmr_loss {__version__}",
        "byteorder": sys.byteorder,
        **content,
    }
    temporary = path / "metadata.json.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**full, "checksum": _json_checksum(full)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / "metadata.json")
    _sync_folder(path)


def _json_checksum(content: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of JSON content, whatever its white space."""
    return zlib.crc32(json.dumps(content).encode())


def _reserve(path: Path, row_bytes: Mapping[str, int], rows: int) -> None:
    """Creates the files of a store with all their space on the disk, filled with zeros."""
    needed = rows * sum(row_bytes.values())
    full = (
        f"the store at {path} needs {needed / 1e9:.2f} GB but the disk has only "
        f"{{free:.2f}} GB free; free some, use another disk, or a smaller sketch_dim"
    )
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(errno.ENOSPC, full.format(free=free / 1e9))
    try:
        for name, size in row_bytes.items():
            with open(path / name, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, rows * size)
                else:
                    for start in range(0, rows * size, 1 << 24):
                        file.write(bytes(min(1 << 24, rows * size - start)))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for name in row_bytes:
            (path / name).unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path).free
            raise OSError(error.errno, full.format(free=free / 1e9)) from error
        raise


def _sync_folder(path: Path) -> None:
    """Makes the names of files in a folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all bytes at an offset."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a store's lock; it ends with the process that holds it, however that ends."""
    try:
        import fcntl
    except ImportError as error:
        raise ImportError(
            "filling a store of representations needs file locks of Linux or macOS; fill it there, "
            "or train without a cache."
        ) from error
    # A file opened anew each time: the lock then belongs to this use, also after a fork.
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mvmr_loss.representations.cache",
        description="Fills, checks and describes stores of representations.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "fill",
        help="compute what is missing; the same command goes on where it stopped",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ).add_argument
    add("store", type=Path, help="folder of the store")
    data = (
        "folder with a folder of images a class, or a class of torchvision.datasets such as CIFAR10"
    )
    add("--data", required=True, help=data)
    add("--root", default="data", help="where torchvision finds the data set named by --data")
    add("--split", default="train", help="of the data set named by --data")
    add(
        "--representations",
        nargs="+",
        metavar="NAME",
        default=["pixels", "scattering", "hog", "local_std"],
        help='names, or JSON with options: \'{"name": "hog", "orientations": 9}\'',
    )
    add("--sketch-dim", type=int, default=1024, help="width of the sketches; 0: exact")
    add("--sketch-seed", type=int, default=0, help="seed of the sketches")
    size = "side of the images: the shorter side is resized to it, and the centre cropped"
    add("--image-size", type=int, required=True, help=size)
    add("--mean", type=float, nargs="+", default=[0.485, 0.456, 0.406], help="of each channel")
    add("--std", type=float, nargs="+", default=[0.229, 0.224, 0.225], help="of each channel")
    add("--dtype", choices=list(_DTYPES), default="float16", help="type of the stored numbers")
    add("--batch-size", type=int, default=64, help="images a batch")
    add("--processes", type=int, default=1, help="processes that compute")
    add("--workers", type=int, default=0, help="worker processes of each that load images")
    add("--device", default="cpu", help="where to compute")
    command = commands.add_parser("verify", help="compare every row with its checksum")
    command.add_argument("store", type=Path, help="folder of the store")
    command.add_argument("--repair", action="store_true", help="mark damaged rows as missing")
    command = commands.add_parser("info", help="tell what is in a store")
    command.add_argument("store", type=Path, help="folder of the store")
    settings = parser.parse_args(arguments)
    if settings.command == "fill":
        for name in ("image_size", "batch_size", "processes"):
            if getattr(settings, name) < 1:
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} must be at least 1 but is {getattr(settings, name)}.")
    return settings


def _dataset(settings: argparse.Namespace) -> Any:
    """Returns the data set that the command line names, with the non-augmented view's transform."""
    try:
        from torchvision import datasets
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            "the fill command reads images with torchvision: pip install torchvision"
        ) from error
    transform = v2.Compose(
        [
            v2.Resize(settings.image_size),
            v2.CenterCrop(settings.image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings.mean, settings.std),
        ]
    )
    if Path(settings.data).is_dir():
        return datasets.ImageFolder(settings.data, transform)
    cls: Any = getattr(datasets, settings.data, None)
    if not isinstance(cls, type):
        raise ValueError(
            "--data must be a folder with one folder of images a class, or the name of a class in "
            f"torchvision.datasets, but is {settings.data!r}."
        )
    options: dict[str, Any] = {"transform": transform}
    known = inspect.signature(cls).parameters
    if "split" in known:
        options["split"] = settings.split
    elif "train" in known:
        options["train"] = settings.split == "train"
    try:
        return cls(settings.root, **options)
    except RuntimeError as error:
        raise ValueError(f"{settings.data} cannot be read in {settings.root}: {error}") from error


def _cached(settings: argparse.Namespace, dataset: Any) -> CachedRepresentations:
    """Returns the cached representations that the command line names."""
    try:
        names = [json.loads(r) if r.startswith("{") else r for r in settings.representations]
    except ValueError as error:
        raise ValueError(f"--representations must be names or JSON: {error}.") from error
    representations = Representations(
        names, sketch_dim=settings.sketch_dim or None, sketch_seed=settings.sketch_seed
    ).to(settings.device)
    return CachedRepresentations(
        representations,
        settings.store,
        num_samples=len(dataset),
        image_shape=(len(settings.mean), settings.image_size, settings.image_size),
        fingerprint=dataset_fingerprint(dataset),
        normalization=(settings.mean, settings.std),
        dtype=_DTYPES[settings.dtype],
    )


def _fill_share(settings: argparse.Namespace, rank: int) -> None:
    """Fills one process's share."""
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))
    try:
        dataset = _dataset(settings)
        fill(
            _cached(settings, dataset),
            dataset,
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            device=settings.device,
            share=(rank, settings.processes),
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(1) from None


def _fill_command(settings: argparse.Namespace) -> None:
    """Fills a store in several processes and shows how far they are."""
    cached = _cached(settings, _dataset(settings))
    cache = cached.cache
    assert cache is not None
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_fill_share, args=(settings, rank))
        for rank in range(settings.processes)
    ]
    total, start = cache.num_samples, time.monotonic()
    before = int(cache.is_valid().sum())
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            processes[0].join(0.5)
            done = int(cache.is_valid().sum())
            rate = (done - before) / (time.monotonic() - start)
            _show(done, total, f"{rate:.0f} images/s" if done > before else "starting")
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            if process.pid is not None:
                process.join()
    done = int(cache.is_valid().sum())
    _show(done, total, "\n")
    if done < total:
        raise OSError(
            f"{total - done} of {total} rows are still missing because a process stopped (see "
            "above); the same command goes on where it stopped."
        )


def _show(done: int, total: int, text: str) -> None:
    """Shows a progress bar."""
    bar = "#" * (30 * done // total)
    print(f"\r{bar:-<30} {done}/{total} {text:<16}", end="", file=sys.stderr, flush=True)


def _info(cache: RepresentationCache) -> str:
    """Returns what is in a store, as text."""
    valid = int(cache.is_valid().sum())
    size = cache._row_bytes * (cache.num_samples + 1)
    lines = [
        f"{cache.path}: {valid} of {cache.num_samples} rows, {size / 1e6:.1f} MB, "
        f"{cache._row_bytes} bytes a row, {str(cache.dtype).removeprefix('torch.')}, "
        f"made by {cache.made_by}",
        *(f"  {name}: {width} numbers" for name, width in cache.widths.items()),
        json.dumps(cache.settings, indent=2),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: As ``sys.argv[1:]``, which is the default.

    Raises:
        SystemExit: With one sentence, if something is wrong with the arguments, data or store.
    """
    settings = _parse(arguments)
    try:
        if settings.command == "fill":
            _fill_command(settings)
        elif settings.command == "info":
            print(_info(RepresentationCache(settings.store)))
        else:
            cache = RepresentationCache(settings.store)
            damaged = cache.verify(
                repair=settings.repair, progress=lambda done, total: _show(done, total, "")
            )
            print(file=sys.stderr)
            if damaged and not settings.repair:
                raise CorruptCacheError(
                    f"{len(damaged)} rows are damaged, the first of them {damaged[0]}; "
                    "--repair marks them as missing."
                )
            print(f"{int(cache.is_valid().sum())} of {cache.num_samples} rows are there and whole.")
            if damaged:
                print(f"{len(damaged)} damaged rows are now marked as missing; fill goes on there.")
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: the same command goes on where it stopped.") from None


if __name__ == "__main__":
    main()

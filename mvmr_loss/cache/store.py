"""A store of fixed features on disk."""

from __future__ import annotations

import errno
import json
import os
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvmr_loss._checks import check_float_tensor, check_int
from mvmr_loss.cache.files import FILES, CorruptCacheError, RowFile, locked, remove, reserve
from mvmr_loss.cache.metadata import difference, is_store, read_metadata, write_metadata

_MARK = 0x4D564D52 << 32  # "MVMR", the upper half of the entry of a row that is there
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class RepresentationCache:
    """A store of fixed features on disk: a row per sample, a block of columns per representation.

    This opens an existing store; :meth:`create` makes one. Rows are read from the files when
    they are asked for, so a store may be larger than memory. The object may be pickled and
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
        row_bytes: Size of a row in the files.

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
        path = Path(path).expanduser()
        metadata = read_metadata(path)
        # A relative path stays the same folder when the working directory changes.
        self.path = path.absolute()
        self.num_samples: int = metadata["num_samples"]
        self.widths: dict[str, int] = metadata["widths"]
        self.dtype = DTYPES[metadata["dtype"]]
        self.settings: dict[str, Any] = metadata["settings"]
        self.made_by: str = metadata["made_by"]
        # One row more than samples: the test image's.
        rows, self.row_bytes = self.num_samples + 1, sum(self.widths.values()) * self.dtype.itemsize
        self._rows = RowFile(self.path / "rows.bin", self.row_bytes, rows)
        self._index = RowFile(self.path / "index.bin", 8, rows)
        may_lock = os.access(self.path / "lock", os.W_OK)
        self.writable = self._rows.writable and self._index.writable and may_lock

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        widths: Mapping[str, int],
        num_samples: int,
        *,
        dtype: torch.dtype | str = torch.float16,
        settings: Mapping[str, Any] | None = None,
    ) -> RepresentationCache:
        """Creates a store, or opens the one there if it was created with the same arguments.

        The space is reserved at once, so a disk that is too small is found out here.

        Args:
            path: Folder of the store: new, empty, or a store already.
            widths: Name of each representation -> how many numbers it has.
            num_samples: Number of samples of the data set.
            dtype: torch.float16 (the default), torch.bfloat16 or torch.float32, or its name.
            settings: What the contents depend on, as JSON can write it.

        Returns:
            The open store.

        Raises:
            TypeError: If an argument is of a wrong type.
            ValueError: If an argument is out of range, the folder holds something else, or the
                store there was created with other arguments.
            OSError: If the disk is too full or the folder may not be written.
        """
        path = Path(path).expanduser().absolute()
        dtype_name = str(dtype).removeprefix("torch.")
        if dtype_name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} but is {dtype}.")
        num_samples = check_int("num_samples", num_samples, minimum=1)
        content: dict[str, Any] = {
            "num_samples": num_samples,
            "widths": _check_widths(widths),
            "dtype": dtype_name,
            "settings": _check_settings(settings),
        }
        if is_store(path):
            return cls._open_same(path, content)
        try:
            path.mkdir(parents=True, exist_ok=True)
            strange = sorted(p.name for p in path.iterdir() if p.name not in FILES)
            if strange:
                raise ValueError(
                    f"path must be a new or empty folder or a store but {path} holds "
                    f"{strange[0]!r}."
                )
            with locked(path):
                if is_store(path):  # Another process was faster.
                    return cls._open_same(path, content)
                row_bytes = sum(content["widths"].values()) * DTYPES[dtype_name].itemsize
                reserve(path, {"rows.bin": row_bytes, "index.bin": 8}, num_samples + 1)
                try:
                    write_metadata(path, content)
                except OSError:
                    remove(path, ("metadata.json", "rows.bin", "index.bin"))
                    raise
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
        there = read_metadata(path)
        other = difference(content, {key: there[key] for key in content})
        if other is not None:
            where, wanted, found = other
            raise ValueError(
                f"the store at {path} is of other settings: {where} is {found} there but {wanted} "
                "here; use the same settings, or another folder for the new ones."
            )
        return cache

    def __getstate__(self) -> dict[str, str]:
        return {"path": str(self.path)}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"RepresentationCache({str(self.path)!r}, {self.num_samples} x {self.widths})"

    def is_valid(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """Tells which rows are there.

        Args:
            indices: Sample indices of shape (N,); None means all.

        Returns:
            Boolean tensor of shape (N,) or (num_samples,), on the CPU.
        """
        self._index.check_size()
        if indices is None:
            entries = bytearray(8 * self.num_samples)
            self._index.read_into(memoryview(entries), 0)
            return torch.frombuffer(entries, dtype=torch.uint8)[7::8] != 0
        return torch.tensor(
            [self._entry(i) != 0 for i in self.check_indices(indices)], dtype=torch.bool
        )

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
            ValueError: If a row is missing.
            CorruptCacheError: If a row does not match its checksum.
        """
        names = list(self.widths) if names is None else names
        for name in names:
            if name not in self.widths:
                raise ValueError(f"names must be among {list(self.widths)} but has {name!r}.")
        rows = self._read_rows(self.check_indices(indices))
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
            ValueError: If a name or shape does not fit, or a value is not finite in the store's type.
            OSError: If the store may not be written or the disk is full.
        """
        self._write_rows(self.check_indices(indices), features)

    def test_row(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the row of the test image, which is that of the features if there is none yet.

        Args:
            features: Name -> tensor of shape (1, D_k), for every representation of the store.
        """
        if not self._entry(self.num_samples):
            self._write_rows([self.num_samples], features)
        blocks = self._read_rows([self.num_samples]).float().split(list(self.widths.values()), 1)
        return dict(zip(self.widths, blocks, strict=True))

    def verify(
        self, *, repair: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[int]:
        """Compares every row that is there with its checksum.

        Args:
            repair: If True, damaged rows are marked missing, so that they are computed again.
            progress: Called with the number of rows done and of all rows, now and then.

        Returns:
            The indices of the damaged rows; the row of the test image is ``num_samples``.
        """
        self._rows.check_size()
        self._index.check_size()
        damaged = []
        for start in range(0, self.num_samples + 1, 1024):
            for i in range(start, min(start + 1024, self.num_samples + 1)):
                if self._entry(i):
                    try:
                        self._read_rows([i])
                    except CorruptCacheError:
                        self._rows.check_size()
                        damaged.append(i)
            if progress is not None:
                progress(min(start + 1024, self.num_samples + 1), self.num_samples + 1)
        if repair and damaged:
            self.check_writable()
            with locked(self.path):
                for i in damaged:
                    self._index.write(i, memoryview(bytes(8)))
                self._index.sync()
        return damaged

    def check_indices(self, indices: Tensor | Sequence[int]) -> list[int]:
        """Returns sample indices as a list after checking them."""
        if isinstance(indices, Tensor):
            if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
                raise TypeError(f"indices must be integers but have dtype {indices.dtype}.")
            if indices.ndim != 1:
                raise ValueError(f"indices must have shape (N,) but have {tuple(indices.shape)}.")
            listed = indices.tolist()
        else:
            try:
                listed = [check_int("indices", i) for i in indices]
            except TypeError as error:
                raise TypeError(f"indices must be integers of shape (N,): {error}") from None
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
        """Returns a row's entry in the index, 0 if the row is missing.

        An entry's last byte is the mark's. Without it a writer was killed amid the entry, where a
        network's file system takes it in pieces, and the row is missing as if it had no entry.
        """
        entry = bytearray(8)
        self._index.read_into(memoryview(entry), i)
        return int.from_bytes(entry, "little") if entry[7] else 0

    def _read_rows(self, indices: Sequence[int]) -> Tensor:
        """Returns rows in the stored type, shape (N, D of all), after comparing the checksums."""
        self._rows.check_size()
        self._index.check_size()
        size = self.row_bytes
        data = bytearray(len(indices) * size)
        # Each row is copied once, and the checksum is that of the copy.
        copies = memoryview(data)
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
            self._rows.read_into(row, i)
            if entry != _MARK | zlib.crc32(row, i & 0xFFFFFFFF):
                raise CorruptCacheError(
                    f"row {i} of the store at {self.path} does not match its checksum: the file is "
                    "damaged; `python -m mvmr_loss.cache verify --repair "
                    f"{shlex.quote(str(self.path))}` marks such rows as missing, so that they are "
                    "computed again."
                )
        return torch.frombuffer(data, dtype=self.dtype).view(len(indices), -1)

    def _write_rows(self, indices: Sequence[int], features: Mapping[str, Tensor]) -> None:
        """Writes rows of checked indices."""
        self.check_writable()
        data = memoryview(self._as_bytes(len(indices), features))
        size = self.row_bytes
        with locked(self.path):
            self._rows.check_size()
            self._index.check_size()
            # A valid row may be being read: it stays as it is. Of a repeated index the last counts.
            new = {i: k for k, i in enumerate(indices) if self._entry(i) == 0}
            if not new:
                return
            try:
                for i, k in new.items():
                    self._rows.write(i, data[k * size : (k + 1) * size])
                self._rows.sync()
                for i, k in new.items():
                    checksum = zlib.crc32(data[k * size : (k + 1) * size], i & 0xFFFFFFFF)
                    entry = (_MARK | checksum).to_bytes(8, "little")
                    self._index.write(i, memoryview(entry))
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
                largest = features[name].abs().max().item()
                raise ValueError(
                    f"features[{name!r}] must be finite in {self.dtype}, the store's type, but "
                    f"reach {largest:.3g}; check the images, or use a store of dtype float32."
                )
            blocks.append(block)
        data = bytearray(count * self.row_bytes)
        torch.cat(blocks, dim=1, out=torch.frombuffer(data, dtype=self.dtype).view(count, -1))
        return data

    def check_writable(self) -> None:
        """Raises if this process may not write to the store."""
        if not self.writable:
            raise PermissionError(
                errno.EACCES,
                f"the store at {self.path} may not be written; change its permissions, "
                "or fill a copy in another folder",
            )


def _check_widths(widths: Any) -> dict[str, int]:
    """Returns how many numbers each representation has, by its name."""
    if not isinstance(widths, Mapping):
        raise TypeError(
            "widths must be a mapping from names of representations to numbers but is a "
            f"{type(widths).__name__}."
        )
    if not widths:
        raise ValueError("widths must name at least one representation but is empty.")
    for name in widths:
        if not isinstance(name, str):
            raise TypeError(f"widths must have names that are strings but has {name!r}.")
    return {name: check_int(f"widths[{name!r}]", w, minimum=1) for name, w in widths.items()}


def _check_settings(settings: Any) -> dict[str, Any]:
    """Returns settings as they read back from the file: tuples as lists, keys as strings."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a mapping but is a {type(settings).__name__}.")
    try:
        read: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"settings must be what JSON can write, such as numbers and strings, but: {error}."
        ) from None
    return read

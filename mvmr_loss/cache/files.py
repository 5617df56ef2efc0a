"""The files of a store: their space on the disk, their rows, their lock."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FILES = ("metadata.json", "metadata.json.new", "rows.bin", "index.bin", "lock")


class CorruptCacheError(OSError, ValueError):
    """Files of a store are truncated or damaged."""


class RowFile:
    """A file of rows of one size, read and written by their number.

    The rows are read, not mapped: a map of a file that is cut short kills the process.

    Args:
        path: The file, which is there.
        row_bytes: Size of a row.
        rows: How many rows there must be.

    Attributes:
        writable: Whether this process may write to it.

    Raises:
        CorruptCacheError: Here and when used, if the file is lost or of another size.
    """

    def __init__(self, path: Path, row_bytes: int, rows: int) -> None:
        self.path, self.row_bytes, self.writable = path, row_bytes, True
        self._size = row_bytes * rows
        try:
            try:
                self._descriptor = os.open(path, os.O_RDWR)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                self._descriptor, self.writable = os.open(path, os.O_RDONLY), False
        except FileNotFoundError:
            raise CorruptCacheError(
                f"the store at {path.parent} has no {path.name}; delete the folder and fill it again."
            ) from None
        self.check_size()

    def __del__(self) -> None:
        if "_descriptor" in self.__dict__:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)

    def check_size(self) -> None:
        """Raises if the file has not its size."""
        size = os.fstat(self._descriptor).st_size
        if size != self._size:
            raise CorruptCacheError(
                f"{self.path} must have {self._size} bytes but has {size}: the store is truncated or "
                "damaged; delete the folder and fill it again."
            )

    def read_into(self, target: memoryview, row: int) -> None:
        """Reads bytes from the start of a row on."""
        offset = row * self.row_bytes
        while len(target):
            count = os.preadv(self._descriptor, [target], offset)
            if count == 0:
                raise CorruptCacheError(
                    f"{self.path} ends at byte {offset}: the store is truncated or damaged; delete "
                    "the folder and fill it again."
                )
            target, offset = target[count:], offset + count

    def write(self, row: int, data: memoryview) -> None:
        """Writes a row."""
        offset = row * self.row_bytes
        while len(data):
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        os.fsync(self._descriptor)


def reserve(path: Path, row_bytes: Mapping[str, int], rows: int) -> None:
    """Creates the files of a store with all their space on the disk, filled with zeros."""
    remove(path, row_bytes)  # What a process left that was killed here takes space.
    needed = rows * sum(row_bytes.values())

    def full() -> str:
        return (
            f"the store at {path} needs {_size(needed)} but the disk has only "
            f"{_size(shutil.disk_usage(path).free)} free; free some, use another disk, or a smaller "
            "sketch_dim"
        )

    if shutil.disk_usage(path).free < needed:
        raise OSError(errno.ENOSPC, full())
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
        remove(path, row_bytes)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, full()) from error
        raise


def remove(path: Path, names: Iterable[str]) -> None:
    """Removes files of a store, so that their space is free again."""
    for name in names:
        (path / name).unlink(missing_ok=True)


def _size(number: int) -> str:
    """Returns a number of bytes, for reading."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def sync_folder(path: Path) -> None:
    """Makes the names of files in a folder survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
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

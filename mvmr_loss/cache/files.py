"""The files of a store: its metadata, its space on the disk, its lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mvmr_loss._version import __version__

FORMAT = 1
FILES = ("metadata.json", "metadata.json.new", "rows.bin", "index.bin", "lock")


class CorruptCacheError(OSError):
    """Files of a store are truncated or damaged."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Reads and checks a store's metadata."""
    file = path / "metadata.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        version = content["format"]
        computed = json_checksum(content)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            errno.ENOENT, f"there is no store at {path}; create and fill it first", str(path)
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        content = None
        checksum = computed = version = 0
    if content is not None and version != FORMAT:
        raise ValueError(
            f"the store at {path} must be of format {FORMAT} but is of format {version}, of "
            "another version of mvmr_loss; fill a new one."
        )
    if content is None or checksum != computed or not _is_metadata(content):
        raise CorruptCacheError(f"{file} is damaged; delete the folder {path} and fill it again.")
    if content["byteorder"] != sys.byteorder:
        raise ValueError(
            f"the store at {path} must be of {sys.byteorder}-endian numbers but is of "
            f"{content['byteorder']}-endian ones; fill it on this kind of machine."
        )
    metadata: dict[str, Any] = content
    return metadata


def _is_metadata(content: dict[str, Any]) -> bool:
    """Tells whether metadata has every entry, each of its type, whatever its checksum."""

    def is_count(value: Any) -> bool:
        return type(value) is int and value >= 1

    settings = content.get("settings")
    if not isinstance(settings, dict):
        return False
    widths, shape = content.get("widths"), settings.get("image_shape")
    return (
        is_count(content.get("num_samples"))
        and isinstance(widths, dict)
        and len(widths) > 0
        and all(map(is_count, widths.values()))
        and content.get("dtype") in ("float16", "bfloat16", "float32")
        and isinstance(content.get("made_by"), str)
        and isinstance(content.get("byteorder"), str)
        and (
            shape is None
            or (isinstance(shape, list) and len(shape) == 3 and all(map(is_count, shape)))
        )
    )


def write_metadata(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a store's metadata, which makes it a store."""
    full = {
        "format": FORMAT,
        "made_by": f"mvmr_loss {__version__}",
        "byteorder": sys.byteorder,
        **content,
    }
    temporary = path / "metadata.json.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({**full, "checksum": json_checksum(full)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path / "metadata.json")
    _sync_folder(path)


def json_checksum(content: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of JSON content, whatever its white space."""
    return zlib.crc32(json.dumps(content).encode())


def reserve(path: Path, row_bytes: Mapping[str, int], rows: int) -> None:
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


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all bytes at an offset."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


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

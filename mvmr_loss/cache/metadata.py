"""A store's metadata: what its rows are, of which data set, and a checksum of all this."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvmr_loss._version import __version__
from mvmr_loss.cache.files import CorruptCacheError, sync_folder

FORMAT = 1


def is_store(path: str | os.PathLike[str]) -> bool:
    """Tells whether there is a store in a folder, be it whole or not."""
    return (Path(path).expanduser() / "metadata.json").exists()


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
        if not any((path / name).exists() for name in ("rows.bin", "index.bin")):
            raise ValueError(
                f"path must be of a store, or of a new or empty folder, but the metadata.json in {path} "
                "is not a store's; choose another folder."
            )
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
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({**full, "checksum": json_checksum(full)}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(
            error.errno, f"the metadata of the store at {path} cannot be written ({error.strerror})"
        ) from error
    temporary.replace(path / "metadata.json")
    sync_folder(path)


def json_checksum(content: Mapping[str, Any]) -> int:
    """Returns the CRC-32 of JSON content, whatever its white space."""
    return zlib.crc32(json.dumps(content).encode())


def difference(a: Any, b: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Returns the first place where two JSON values differ, and both values there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            if (key in a) != (key in b):
                return where or "content", sorted(a), sorted(b)
            found = difference(a[key], b[key], f"{where}.{key}" if where else key)
            if found is not None:
                return found
        # The order of columns is the order of bytes.
        return None if list(a) == list(b) or where != "widths" else (where, list(a), list(b))
    # NaN, which an option may be, is not equal to itself.
    return None if a == b or (a != a and b != b) else (where, a, b)

"""Where compiled libraries are kept: folders of the user's own, and nothing else is loaded from them.

A library's name ends in the digest of its bytes. What is empty, cut short, damaged, a link or another
user's has no such name or is not ours, and is built anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def find_or_build(prefix: str, build: Callable[[], bytes]) -> ctypes.CDLL:
    """Loads a library from the first folder that is fit for it: the user's cache, then a temporary one.

    Args:
        prefix: What its name begins with; it must change whenever another library would be built.
        build: Returns its bytes; called where no folder has it, by one process at a time.

    Raises:
        OSError: If no folder is the user's alone and can be written to, or it cannot be loaded.
    """
    build = functools.cache(build)
    unfit: dict[Path, str] = {}
    for may_build in (False, True):  # what there is in any folder comes first
        for path in _folders():
            try:
                with _private(path, create=may_build) as folder:
                    name = _find(folder, prefix)
                    if name is None and may_build:
                        with _locked(folder) as alone:  # one compiles, the others wait for it
                            name = _find(folder, prefix) or _keep(
                                folder, prefix, build(), alone=alone
                            )
                    if name is not None:
                        return _open(folder, path, name)
            except OSError as error:  # noqa: PERF203 - there are two folders
                unfit[path] = f"{path}: {error.strerror or error}"
    raise OSError("it can be kept in or loaded from no folder: " + "; ".join(unfit.values()))


def _folders() -> Iterator[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(RuntimeError):  # without a home
        yield (cache if cache.is_absolute() else Path.home() / ".cache") / "mvmr-loss" / "native"
    yield Path(tempfile.gettempdir()) / f"mvmr-loss-{os.geteuid()}"


def _is_ours(found: os.stat_result) -> bool:
    """Tells whether nobody else can write to a file or folder, but for the superuser."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def _private(path: Path, *, create: bool) -> Iterator[int]:
    """Opens a folder of the user's own.

    All that follows goes through the opened folder: whatever is put in its place afterwards, by
    those who can write to the folder that it lies in, is not looked at.
    """
    if create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if not _is_ours(os.fstat(folder)):
            raise PermissionError("others own it or can write to it")
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(folder: int) -> Iterator[bool]:
    """Waits for the lock, and gives whether there is one: some file systems have none."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open("lock", flags, 0o600, dir_fd=folder), "w") as lock:
        alone = False
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
                alone = True
        yield alone


def _find(folder: int, prefix: str) -> str | None:
    """Returns the name of a library that is ours and whole: it ends in the digest of its bytes."""
    for name in os.listdir(folder):
        if name.startswith(prefix) and name.endswith(".so"):
            # A link is an error, and a pipe does not wait for a writer.
            with (
                contextlib.suppress(OSError),
                open(name, "rb", opener=_opener(folder, os.O_NOFOLLOW | os.O_NONBLOCK)) as file,
            ):
                found = os.fstat(file.fileno())
                if stat.S_ISREG(found.st_mode) and _is_ours(found):
                    digest = hashlib.sha256(file.read()).hexdigest()
                    if name == f"{prefix}{digest}.so":
                        return name
    return None


def _keep(folder: int, prefix: str, library: bytes, *, alone: bool) -> str:
    """Writes a library, whole or not at all, in place of what else begins with its name.

    Without a lock what else there is may be another's that writes or loads it right now: it stays.
    """
    for name in os.listdir(folder) if alone else ():
        if name.startswith(prefix):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
    name = f"{prefix}{hashlib.sha256(library).hexdigest()}.so"
    part = f"{prefix}{secrets.token_hex(8)}.part"
    with open(part, "xb", opener=_opener(folder, os.O_NOFOLLOW)) as file:
        file.write(library)
    os.chmod(part, 0o700, dir_fd=folder)
    os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    return name


def _opener(folder: int, flags: int) -> Callable[[str, int], int]:
    return lambda name, mode: os.open(name, mode | flags, 0o600, dir_fd=folder)


def _open(folder: int, path: Path, name: str) -> ctypes.CDLL:
    opened = Path(f"/proc/self/fd/{folder}")  # the very folder that was checked, on Linux
    return ctypes.CDLL(str((opened if opened.is_dir() else path) / name))

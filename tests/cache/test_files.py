"""The files of a store by themselves: short reads and writes, permissions, space."""

import errno
import os
import shutil
import sys

import pytest

from mvmr_loss.cache import CorruptCacheError, RepresentationCache, files
from tests.cache.helpers import features

DATA = bytes(range(12))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.bin"
    path.write_bytes(bytes(36))
    return files.RowFile(path, 12, 3)


def read(file, row, size=12):
    target = bytearray(size)
    file.read_into(memoryview(target), row)
    return bytes(target)


@pytest.mark.parametrize("most", [1, 5, 100])
def test_calls_that_do_a_part(file, monkeypatch, most):
    """As of a network's file system."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda f, parts, at: preadv(f, [parts[0][:most]], at))
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: pwrite(f, data[:most], at))
    file.write(1, memoryview(DATA))
    assert read(file, 1) == DATA
    assert read(file, 0, 36) == bytes(12) + DATA + bytes(12)


def test_cut_short_while_it_is_open(file):
    os.truncate(file.path, 20)
    assert read(file, 0) == bytes(12)
    with pytest.raises(CorruptCacheError, match="ends at byte 20: the store is truncated"):
        read(file, 1)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO])
def test_what_may_only_be_read(file, monkeypatch, code):
    opened = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_RDWR:
            raise OSError(code, os.strerror(code))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.RowFile(file.path, 12, 3)
    else:
        assert not files.RowFile(file.path, 12, 3).writable
    assert file.writable


def test_is_closed_with_its_object(file):
    other = files.RowFile(file.path, 12, 3)
    descriptor = other._descriptor
    del other
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("fallocate", [True, False])
def test_space_is_reserved(tmp_path, monkeypatch, fallocate):
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    large = (1 << 23) + 5
    files.reserve(tmp_path, {"a": large, "b": 2}, 3)
    assert [(tmp_path / name).stat().st_size for name in "ab"] == [3 * large, 6]
    assert not any((tmp_path / "b").read_bytes())


def test_space_that_is_just_enough(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for free in (29, 30):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, f=free: usage._replace(free=f))
        if free < 30:
            with pytest.raises(OSError, match="the disk has only") as error:
                files.reserve(tmp_path, {"a": 4, "b": 6}, 3)
            assert error.value.errno == errno.ENOSPC
            assert not list(tmp_path.iterdir())
        else:
            files.reserve(tmp_path, {"a": 4, "b": 6}, 3)


def test_the_lock_is_one_of_the_files(tmp_path):
    with files.locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} <= set(files.FILES)


@pytest.mark.parametrize("fallocate", [True, False])
def test_any_other_error_of_the_disk_is_told(tmp_path, monkeypatch, fallocate):
    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(os, "posix_fallocate" if fallocate else "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as error:
        files.reserve(tmp_path, {"a": 4, "b": 6}, 3)
    assert error.value.errno == errno.EIO
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fallocate", [True, False])
def test_what_is_written_is_on_the_disk(tmp_path, monkeypatch, fallocate):
    """Files as long as they get, their names, and rows before they are marked as there."""
    synced, fsync = [], os.fsync

    def noted(descriptor):
        state = os.fstat(descriptor)
        synced.append((state.st_ino, state.st_size))
        fsync(descriptor)

    def now(path):
        return path.stat().st_ino, path.stat().st_size

    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(os, "fsync", noted)
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    rows, index, metadata = (tmp_path / f for f in ("rows.bin", "index.bin", "metadata.json"))
    assert synced == [now(rows), now(index), now(metadata), now(tmp_path)]
    synced.clear()
    store.write([1], features([1]))
    assert synced == [now(rows)]
    with open(rows, "r+b") as damaged:
        damaged.write(b"x" * 20)
    synced.clear()
    store.verify(repair=True)
    assert synced == [now(index)]


def test_one_holds_the_lock(tmp_path):
    import fcntl

    def is_free():
        with open(tmp_path / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with files.locked(tmp_path):
        assert not is_free()
    assert is_free()
    with pytest.raises(KeyError), files.locked(tmp_path):
        raise KeyError
    assert is_free()


def test_exception_without_file_locks(tmp_path, monkeypatch):
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (
        pytest.raises(ImportError, match="needs file locks of Linux or macOS"),
        files.locked(tmp_path),
    ):
        pass

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from mvmr_loss.cache import (
    RepresentationCache,
)
from tests.cache.helpers import (
    as_nobody,
    damaged_store,
    features,
)


def test_exception_disk_too_small(tmp_path):
    huge = shutil.disk_usage(tmp_path).total
    with pytest.raises(OSError, match=r"needs .* GB but the disk has only .* GB free") as caught:
        RepresentationCache.create(tmp_path / "s", {"a": 512}, huge // 1024)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "s" / "rows.bin").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_exception_disk_full_while_reserving(tmp_path, monkeypatch, code):
    def no_space(*arguments):
        raise OSError(code, "no space")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(OSError, match="free some, use another disk"):
        RepresentationCache.create(tmp_path, {"a": 5}, 6)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lock"]
    RepresentationCache.create(tmp_path, {"a": 5}, 6)


def test_exception_disk_full_while_writing(tmp_path, monkeypatch):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    calls, pwrite = [], os.pwrite

    def fails_on_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fails_on_the_third)
    with pytest.raises(OSError, match=r"could not be written .No space left on device"):
        store.write(range(6), features(range(6)))
    assert not store.is_valid().any()
    store.write(range(6), features(range(6)))
    assert torch.equal(store.read(range(6))["a"], features(range(6))["a"])


def test_read_only_folder(public_folder):
    folder = damaged_store(public_folder / "s")
    os.truncate(folder / "lock", 0)
    with open(folder / "index.bin", "r+b") as file:
        file.write(bytes(8))  # Row 0 is missing.
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)

    def read():
        store = RepresentationCache(folder)
        rows = store.read([1, 5])
        raise RuntimeError(torch.equal(rows["a"], features([1, 5])["a"]))

    def write():
        RepresentationCache(folder).write([0], features([0]))

    def create():
        RepresentationCache.create(folder / "new", {"a": 5}, 6)

    assert as_nobody(read) == "RuntimeError: True"
    assert as_nobody(write).startswith("PermissionError")
    assert "may not be written; change its permissions" in as_nobody(write)
    assert "cannot be created because the folder may not be written" in as_nobody(create)


def test_exception_disk_full_while_describing(tmp_path, monkeypatch):
    """No half of a description is left, and the folder serves once there is space."""
    fsync, calls = os.fsync, []

    def fails_on_the_third(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_on_the_third)
    match = r"metadata of the store at .* cannot be written \(No space left on device\)"
    with pytest.raises(OSError, match=match) as error:
        RepresentationCache.create(tmp_path, {"a": 5}, 6)
    assert error.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    RepresentationCache.create(tmp_path, {"a": 5}, 6).write([1], features([1]))


def test_disk_full_while_the_folder_is_written(tmp_path, monkeypatch):
    """When the description has its name already: nothing is left that would be taken for a store."""

    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mvmr_loss.cache.metadata.sync_folder", fail)
    with pytest.raises(OSError, match="No space left"):
        RepresentationCache.create(tmp_path, {"a": 5}, 6)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


def test_what_a_killed_process_left_does_not_count(tmp_path, monkeypatch):
    """On a disk that has space for one store, and holds the files of one without a description."""
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    (tmp_path / "metadata.json").rename(tmp_path / "metadata.json.new")
    usage, space = shutil.disk_usage(tmp_path), 7 * (store.row_bytes + 8)

    def free(path):
        taken = [p.stat().st_size for p in tmp_path.iterdir() if p.suffix == ".bin"]
        return usage._replace(free=space - sum(taken))

    monkeypatch.setattr(shutil, "disk_usage", free)
    RepresentationCache.create(tmp_path, {"a": 5}, 6).write([1], features([1]))
    with pytest.raises(OSError, match=r"needs 0\.01 MB but the disk has only 0\.00 MB free"):
        RepresentationCache.create(tmp_path / "other", {"a": 500}, 6)


def test_another_process_makes_the_same_store_first(tmp_path, monkeypatch):
    mkdir, made = Path.mkdir, []

    def slow(folder, *arguments, **options):
        mkdir(folder, *arguments, **options)
        if not made:
            made.append(folder)
            RepresentationCache.create(tmp_path / "s", {"a": 5}, 6).write([1], features([1]))

    monkeypatch.setattr(Path, "mkdir", slow)
    store = RepresentationCache.create(tmp_path / "s", {"a": 5}, 6)
    assert made
    assert torch.equal(store.read([1])["a"], features([1])["a"])

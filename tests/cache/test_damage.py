from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch

from mvmr_loss import Representations
from mvmr_loss.cache import (
    CorruptCacheError,
    RepresentationCache,
)
from mvmr_loss.cache import metadata as metadata_module
from tests.cache.helpers import (
    damaged_store,
    features,
    snapshot,
)


@pytest.mark.parametrize("file", ["rows.bin", "index.bin"])
@pytest.mark.parametrize("change", [-1, 1])
def test_exception_wrong_size(tmp_path, file, change):
    folder = damaged_store(tmp_path)
    opened = RepresentationCache(folder)
    os.truncate(folder / file, (folder / file).stat().st_size + change)
    with pytest.raises(CorruptCacheError, match=rf"{file} must have \d+ bytes but has"):
        RepresentationCache(folder)
    # A store that is open already must not read beyond the end of the file, which would kill it.
    with pytest.raises(CorruptCacheError, match="truncated"):
        opened.read([5])


def test_every_flipped_bit_of_a_row_is_found(tmp_path):
    folder = damaged_store(tmp_path)
    data = bytearray((folder / "rows.bin").read_bytes())
    for bit in range(3 * 80, 4 * 80):  # row 3: 5 numbers of 16 bits
        data[bit // 8] ^= 1 << bit % 8
        (folder / "rows.bin").write_bytes(data)
        with pytest.raises(CorruptCacheError, match=r"row 3 .* does not match its checksum"):
            RepresentationCache(folder).read([2, 3])
        data[bit // 8] ^= 1 << bit % 8
    (folder / "rows.bin").write_bytes(data)
    assert RepresentationCache(folder).verify() == []


def test_every_flipped_bit_of_an_entry_is_found(tmp_path):
    folder = damaged_store(tmp_path)
    data = bytearray((folder / "index.bin").read_bytes())
    for bit in range(3 * 64, 4 * 64):
        data[bit // 8] ^= 1 << bit % 8
        (folder / "index.bin").write_bytes(data)
        assert RepresentationCache(folder).verify() == [3]
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("written", range(1, 8))
def test_a_half_written_entry_is_a_missing_row(tmp_path, written):
    """As a writer leaves it that is killed where a network's file system takes writes in pieces."""
    folder = damaged_store(tmp_path)
    whole = (folder / "index.bin").read_bytes()
    half = whole[: 3 * 8 + written] + bytes(8 - written) + whole[4 * 8 :]
    (folder / "index.bin").write_bytes(half)
    store = RepresentationCache(folder)
    assert store.is_valid().tolist() == [i != 3 for i in range(store.num_samples)]
    assert not store.is_valid([3])
    assert store.verify() == []
    with pytest.raises(ValueError, match="1 of 2 are missing, the first of them 3"):
        store.read([2, 3])
    store.write([3], features(torch.tensor([3])))
    assert (folder / "index.bin").read_bytes() == whole
    assert store.is_valid().all()


def test_swapped_and_zeroed_rows_are_found(tmp_path):
    folder = damaged_store(tmp_path)
    rows, index = (folder / "rows.bin").read_bytes(), (folder / "index.bin").read_bytes()
    # Rows 0 and 1 change places, together with their checksums.
    (folder / "rows.bin").write_bytes(rows[10:20] + rows[:10] + rows[20:])
    (folder / "index.bin").write_bytes(index[8:16] + index[:8] + index[16:])
    assert RepresentationCache(folder).verify() == [0, 1]
    (folder / "rows.bin").write_bytes(bytes(len(rows)))
    (folder / "index.bin").write_bytes(index)
    assert RepresentationCache(folder).verify() == list(range(6))


def test_the_command_in_the_error_runs(tmp_path):
    folder = damaged_store(tmp_path / "my store's")
    with open(folder / "rows.bin", "r+b") as file:
        file.write(b"x")
    with pytest.raises(CorruptCacheError) as error:
        RepresentationCache(folder).read([0])
    command = shlex.split(str(error.value).split("`")[1])
    assert command == ["python", "-m", "mvmr_loss.cache", "verify", "--repair", str(folder)]


def test_repair(tmp_path):
    folder = damaged_store(tmp_path)
    with open(folder / "rows.bin", "r+b") as file:
        file.seek(23)
        file.write(b"x")
    store = RepresentationCache(folder)
    assert store.verify(repair=True) == [2]
    assert store.is_valid().tolist() == [True, True, False, True, True, True]
    store.write([2], features([2]))
    assert torch.equal(store.read(range(6))["a"], features(range(6))["a"])


@pytest.mark.parametrize("content", ["", "[]", '{"classes": ["cat"]}', '{"format": 1}'])
@pytest.mark.parametrize("use", ["open", "create", "module"])
def test_exception_metadata_of_something_else(tmp_path, content, use):
    """Nobody is told to delete a folder of one's own."""
    (tmp_path / "metadata.json").write_text(content)
    (tmp_path / "cat.png").write_bytes(b"x")
    before = snapshot(tmp_path)
    uses = {
        "open": lambda: RepresentationCache(tmp_path),
        "create": lambda: RepresentationCache.create(tmp_path, {"a": 5}, 6),
        "module": lambda: Representations(["pixels"], cache={"path": tmp_path, "num_samples": 6}),
    }
    with pytest.raises(ValueError, match=r"is not a store's; choose another folder") as error:
        uses[use]()
    assert "delete" not in str(error.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', "\x00" * 100])
def test_exception_damaged_metadata(tmp_path, content):
    folder = damaged_store(tmp_path)
    (folder / "metadata.json").write_text(content)
    with pytest.raises(CorruptCacheError, match=r"metadata\.json is damaged"):
        RepresentationCache(folder)


def test_exception_changed_metadata(tmp_path):
    folder = damaged_store(tmp_path)
    original = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text(original.replace('"a": 5', '"b": 5'))
    with pytest.raises(CorruptCacheError, match="damaged"):
        RepresentationCache(folder)
    for key, value, match in (("format", 9, "format 9"), ("byteorder", "big", "endian")):
        content = json.loads(original)
        content[key] = value
        del content["checksum"]
        content["checksum"] = metadata_module.json_checksum(content)
        (folder / "metadata.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=match):
            RepresentationCache(folder)


@pytest.mark.parametrize("file", ["rows.bin", "index.bin"])
def test_exception_lost_file(tmp_path, file):
    folder = damaged_store(tmp_path)
    (folder / file).unlink()
    with pytest.raises(CorruptCacheError, match=f"has no {file}"):
        RepresentationCache(folder)


def test_half_created_store_is_created_anew(tmp_path):
    damaged_store(tmp_path)
    (tmp_path / "metadata.json").rename(tmp_path / "metadata.json.new")
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    assert not store.is_valid().any()


@pytest.mark.parametrize("file", ["rows.bin", "index.bin"])
@pytest.mark.parametrize("use", ["read", "is_valid", "one_valid", "verify", "write", "module"])
def test_exception_truncated_under_an_open_store(tmp_path, file, use):
    images = torch.randn(2000, 3, 2, 2)
    module = Representations(["pixels"], cache={"path": tmp_path, "num_samples": 2000})
    module(images[:1990], range(1990))
    store = module.cache.store
    os.truncate(tmp_path / file, 0)
    if file == "rows.bin" and use in ("is_valid", "one_valid"):
        assert store.is_valid([1900])  # It needs the index alone.
        return
    calls = {
        "read": lambda: store.read([1900]),
        "is_valid": lambda: store.is_valid(),
        "one_valid": lambda: store.is_valid([1900]),
        "verify": lambda: store.verify(),
        "write": lambda: store.write([1999], {"pixels": torch.zeros(1, 12)}),
        "module": lambda: module(images[:2], [1900, 1901]),
    }
    with pytest.raises(CorruptCacheError, match="truncated"):
        calls[use]()


@pytest.mark.parametrize("size", [1, 8, 15_000])
def test_exception_truncated_index_in_the_middle_of_a_training(tmp_path, size):
    """In a process of its own, which a signal would kill."""
    program = f"""
import os, torch
from mvmr_loss import Representations
images = torch.randn(2000, 3, 2, 2)
module = Representations(["pixels"], cache={{"path": "store", "dataset": images}})
module(images, range(2000))
os.truncate("store/index.bin", {size})
module(images[:64], range(1900, 1964))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "CorruptCacheError" in done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"representations": 3},
        {"representations": {"pixels": []}},
        {"fingerprint": [[]]},
        {"fingerprint": {}},
        {"normalization": "x"},
        {"normalization": [[None], 1]},
        {"image_shape": None},
    ],
    ids=str,
)
def test_exception_settings_of_wrong_types(tmp_path, settings):
    """What another program wrote, with a right checksum, is another store's, and said so."""
    images = torch.randn(4, 3, 2, 2)

    def module():
        return Representations(["pixels"], cache={"path": tmp_path, "dataset": images})

    module()(images, range(4))
    content = json.loads((tmp_path / "metadata.json").read_text())
    del content["checksum"]
    content["settings"] |= settings
    checksum = metadata_module.json_checksum(content)
    (tmp_path / "metadata.json").write_text(json.dumps({**content, "checksum": checksum}))
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}\S* is .* there but"):
        module()(images, range(4))


@pytest.mark.parametrize(
    "key", ["num_samples", "widths", "dtype", "settings", "made_by", "byteorder"]
)
def test_exception_metadata_of_wrong_types(tmp_path, key):
    folder = damaged_store(tmp_path)
    content = json.loads((folder / "metadata.json").read_text())
    del content["checksum"]
    shapes = [{"image_shape": shape} for shape in (5, "abc", [3, 8], [3, 8, "8"], [3, 8, 0], {})]
    wrong = [
        None,
        -1,
        1.5,
        True,
        "x",
        [],
        {},
        {"a": "5"},
        [[]],
        *(shapes if key == "settings" else []),
    ]
    allowed = {"settings": [{}, {"a": "5"}], "made_by": ["x"]}
    changed = [{**content, key: v} for v in wrong if v not in allowed.get(key, [])]
    for metadata in (*changed, {k: v for k, v in content.items() if k != key}):
        if metadata.get(key) == "x" and key == "byteorder":
            continue  # Another machine's: an error of its own.
        checksum = metadata_module.json_checksum(metadata)
        (folder / "metadata.json").write_text(json.dumps({**metadata, "checksum": checksum}))
        with pytest.raises(CorruptCacheError, match=r"metadata\.json is damaged"):
            RepresentationCache(folder)
    (folder / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(CorruptCacheError, match=r"metadata\.json is damaged"):
        RepresentationCache(folder)


def test_verify_alone_repairs_nothing(tmp_path):
    folder = damaged_store(tmp_path)
    with open(folder / "rows.bin", "r+b") as file:
        file.write(b"x" * 15)
    before = snapshot(folder)
    for _ in range(2):
        assert RepresentationCache(folder).verify() == [0, 1]
    assert snapshot(folder) == before
    assert RepresentationCache(folder).verify(repair=True) == [0, 1]
    assert RepresentationCache(folder).verify() == []


@pytest.mark.parametrize("file", ["rows.bin", "index.bin"])
def test_exception_truncated_while_empty(tmp_path, file):
    store = RepresentationCache.create(tmp_path, {"a": 5}, 6)
    os.truncate(tmp_path / file, 8)
    with pytest.raises(CorruptCacheError, match=f"{file} must have .* bytes but has 8"):
        store.verify()

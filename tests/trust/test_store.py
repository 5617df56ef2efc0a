"""The attacks on the store in a short form; ``python -m tests.trust store`` is the whole."""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import tempfile
import time
import zlib
from pathlib import Path

import pytest

from mvmr_loss.cache import RepresentationCache
from mvmr_loss.cache import metadata as metadata_module
from mvmr_loss.cache import store as store_module
from tests.trust import store
from tests.trust.identity import identity

# How often here.
SHORT = {
    store.kills: 6,
    store.bit_flips: 60,
    store.reader_while_filling: 1,
    store.truncation: 15,
    store.full_disk: 4,
    store.full_file_system: 12,
    store.wrong_owner: 2,
    store.network: 1,
    store.metadata: 150,
    store.threads_and_types: 8,
    identity: 25,
}


@pytest.mark.parametrize("attack", SHORT, ids=lambda attack: attack.__name__)
def test_attack(attack):
    with tempfile.TemporaryDirectory() as folder:
        counts, faults = attack(Path(folder) / "store", random.Random(0), SHORT[attack])
    assert not faults, faults
    for what in counts:
        if what.startswith("left out"):
            pytest.skip(what)
    assert sum(counts.values()) >= SHORT[attack]
    assert set(store.ATTACKS) < set(SHORT)


def test_attacks_find_a_store_without_checksums(tmp_path, monkeypatch):
    """What the attacks would say of a store that does not look at what it reads."""
    monkeypatch.setattr(store_module.zlib, "crc32", lambda data, start=0: 0)
    _, faults = store.bit_flips(tmp_path / "store", random.Random(0), 20)
    assert any("wrong numbers" in fault for fault in faults)


def unchecked(path):
    return json.loads((path / "metadata.json").read_text())


def flipped(folder, count=60):
    counts, faults = store.bit_flips(folder, random.Random(0), count)
    return counts, [fault for fault in faults if "wrong numbers" not in fault]


def test_each_flip_is_found_in_the_file_that_it_is_in(tmp_path):
    counts, faults = flipped(tmp_path / "store")
    assert not faults
    for name in ("rows.bin", "index.bin", "metadata.json"):
        assert counts[f"found in {name}"] > 10
        assert counts[f"found in {name}"] + counts[f"harmless in {name}"] == counts[f"in {name}"]


@pytest.mark.parametrize(
    ("name", "blind"),
    [
        ("rows.bin", "A row's checksum is that of its first half."),
        ("index.bin", "The upper half of an entry is not looked at."),
        ("metadata.json", "Metadata have no checksum."),
    ],
)
def test_flips_that_are_not_found_are_told_of_their_file(name, blind, tmp_path, monkeypatch):
    """Those found in other files do not make up for them."""
    crc32 = zlib.crc32
    if name == "rows.bin":
        monkeypatch.setattr(
            store_module.zlib, "crc32", lambda data, start=0: crc32(data[: len(data) // 2], start)
        )
    elif name == "index.bin":
        entry = store_module.RepresentationCache._entry

        def half(self, i):
            found = entry(self, i)
            return found and store_module._MARK | (found & 0xFFFFFFFF)

        monkeypatch.setattr(store_module.RepresentationCache, "_entry", half)
    else:
        monkeypatch.setattr(store_module, "read_metadata", unchecked)
    counts, faults = flipped(tmp_path / "store")
    assert counts[f"missed in {name}"] > 2, blind
    assert len(faults) >= counts[f"missed in {name}"]
    assert all(f" in {name}: " in fault for fault in faults)


def test_the_attack_on_metadata_finds_a_store_without_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "read_metadata", unchecked)
    _, faults = store.metadata(tmp_path / "store", random.Random(0), 100)
    assert any("not found" in fault for fault in faults)


@pytest.mark.parametrize(
    ("attack", "user", "said"),
    [
        (store.wrong_owner, {"geteuid": lambda: 1000}, "left out: not root"),
        (store.full_file_system, {}, "left out: no mounting"),
    ],
    ids=["wrong_owner", "full_file_system"],
)
def test_what_cannot_be_done_here_is_counted_and_skipped(attack, user, said, monkeypatch):
    for name, function in user.items():
        monkeypatch.setattr(os, name, function)
    monkeypatch.setenv("PATH", "")  # There is no mount.
    with pytest.raises(pytest.skip.Exception, match=said):
        test_attack(attack)


def test_metadata_that_find_no_room_are_an_error_that_names_the_store(tmp_path, monkeypatch):
    """As where the rows took the last of it."""
    path = tmp_path / "store"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(metadata_module.json, "dump", lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match=f"metadata of the store at {path} .*No space") as error:
            RepresentationCache.create(path, {"a": 1}, 1)
    assert error.value.errno == errno.ENOSPC
    assert not list(path.glob("metadata*"))
    assert not RepresentationCache.create(path, {"a": 1}, 1).is_valid().any()


def test_attacks_find_a_store_that_reserves_no_room(tmp_path, monkeypatch):
    """On a file system that is full, rows whose room was said to be kept have none."""

    def sparse(path, row_bytes, rows):
        for name, size in row_bytes.items():
            (path / name).touch()
            os.truncate(path / name, size * rows)

    monkeypatch.setattr(store_module, "reserve", sparse)
    counts, faults = store.full_file_system(tmp_path / "store", random.Random(0), 6)
    if "left out: no mounting" in counts:
        pytest.skip("a file system may not be mounted here")
    assert any("no room for rows whose room was kept" in fault for fault in faults)


def test_attacks_find_a_store_that_marks_rows_too_early(tmp_path, monkeypatch):
    """Of a store that marks rows before their data are there, a kill leaves wrong rows."""

    def marks_first(self, indices, features):
        data, size = memoryview(self._as_bytes(len(indices), features)), self.row_bytes
        for k, i in enumerate(indices):
            row = data[k * size : (k + 1) * size]
            mark = store_module._MARK | zlib.crc32(row, int(i))
            self._index.write(int(i), memoryview(mark.to_bytes(8, "little")))
            time.sleep(0.001)
            self._rows.write(int(i), row)

    monkeypatch.setattr(store_module.RepresentationCache, "_write_rows", marks_first)
    _, faults = store.kills(tmp_path / "store", random.Random(0), 20)
    assert any("wrong or damaged rows" in fault for fault in faults)


def test_command(tmp_path, capsys):
    settings = argparse.Namespace(seed=3, scale=0.0)
    figures, faults = store.attack(settings)
    assert set(figures) == {attack.__name__ for attack in SHORT}
    assert faults == []
    assert "bit_flips" in capsys.readouterr().out

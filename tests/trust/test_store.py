"""The attacks on the store in a short form; ``python -m tests.trust store`` is the whole."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import zlib
from pathlib import Path

import pytest

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
    assert sum(counts.values()) >= SHORT[attack]
    assert set(store.ATTACKS) < set(SHORT)


def test_attacks_find_a_store_without_checksums(tmp_path, monkeypatch):
    """What the attacks would say of a store that does not look at what it reads."""
    monkeypatch.setattr(store_module.zlib, "crc32", lambda data, start=0: 0)
    _, faults = store.bit_flips(tmp_path / "store", random.Random(0), 20)
    assert any("wrong numbers" in fault for fault in faults)


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

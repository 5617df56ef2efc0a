"""docs/trust.md says what the records say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.harness.records import validate
from tests.cache.helpers import ROOT
from tests.trust import store

FILES = sorted((Path(__file__).parent / "results").glob("*.json"))
RECORDS = {path.stem: json.loads(path.read_text()) for path in FILES}
TEXT = (ROOT / "docs" / "trust.md").read_text()


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_whole_and_without_faults(name):
    validate(RECORDS[name], name)
    assert RECORDS[name]["figures"]["faults"] == []
    assert RECORDS[name]["versions"]["torch"] in TEXT
    assert RECORDS[name]["date"] in TEXT


def test_every_attack_is_in_the_table():
    figures = RECORDS["store"]["figures"]
    assert set(figures) == {"faults", "identity", *(attack.__name__ for attack in store.ATTACKS)}
    for line in store.lines(figures):
        assert line in TEXT


def test_every_flipped_bit_is_accounted_for():
    counts = Counter(RECORDS["store"]["figures"]["bit_flips"])
    for name in ("rows.bin", "index.bin", "metadata.json"):
        assert counts[f"found in {name}"] > 0
        of = counts[f"in {name}"]
        assert counts[f"found in {name}"] + counts[f"harmless in {name}"] == of


def test_every_process_of_the_soak_is_in_the_table():
    for name in sorted(RECORDS):
        if name.startswith("soak"):
            processes = RECORDS[name]["figures"]["processes"]
            assert RECORDS[name]["figures"]["steps"] == 20_000
            for result in processes:
                held = result["last_three_quarters"]
                memory = " to ".join(f"{held['memory_mb'][part]:.1f}" for part in ("first", "last"))
                same = [f"{held[what]['last']:.0f}" for what in ("handles", "threads", "objects")]
                which = f"{len(processes)}, number {result['rank']}"
                assert row(which, memory, *same) in TEXT
                for what in ("handles", "threads"):
                    assert held[what]["least"] == held[what]["most"]

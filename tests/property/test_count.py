"""How many cases the slow run draws."""

import importlib
from pathlib import Path

from tests.property import cases


def test_ten_thousand_at_least():
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.property.{path.stem}")
    assert sum(cases.DRAWN.values()) >= 10_000

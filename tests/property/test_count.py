"""How many cases the slow run draws."""

import importlib

from tests.property import cases


def test_ten_thousand_at_least():
    for name in ("compiled", "loss", "measures", "representations"):
        importlib.import_module(f"tests.property.test_{name}")
    assert sum(cases.DRAWN.values()) >= 10_000

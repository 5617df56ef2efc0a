"""Which cases are drawn: how many in the slow run, and the same whatever else is loaded."""

import importlib
import importlib.util
import sys
from pathlib import Path

from hypothesis import strategies as st

from tests.property import cases


def test_ten_thousand_at_least():
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.property.{path.stem}")
    assert sum(cases.DRAWN.values()) >= 10_000


def test_cases_do_not_depend_on_loaded_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "DRAWN", {})

    def drawn():
        found = []
        decorate = cases.cases(None, 300, number=st.integers(0, 10**6))
        decorate(lambda number: found.append(number))(300)
        return found

    before = drawn()
    path = tmp_path / "many_numbers.py"
    path.write_text(f"NUMBERS = {list(range(1000, 2000))}")
    spec = importlib.util.spec_from_file_location("many_numbers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "many_numbers", module)
    assert drawn() == before

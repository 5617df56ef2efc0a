"""The runner of mutants: what it makes, and that faults put into living functions are at work there."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""Text."""
LIMIT = 3


def scaled(x, factor=2.0):
    """Text."""
    if x > LIMIT and not x == 7:
        raise ValueError(f"x must be at most {LIMIT}.")

    def nested(y):
        return y * factor

    return nested(x) + 1
'''


@pytest.fixture
def runner(monkeypatch):
    """Its two modules, which stand beside it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import mutants
    import swapping

    return mutants, swapping


def test_faults_are_small_and_differ(runner):
    found = list(runner[0].mutants(SOURCE))
    done = {m.key.split(" | ")[1] for m in found}
    assert {
        *("3 -> 4", "x > LIMIT -> x >= LIMIT", "not x == 7 -> x == 7", "x == 7 -> x != 7"),
        *("y * factor -> y / factor", "nested(x) + 1 -> nested(x) - 1", "2.0 -> 4.0"),
    } <= done
    assert 'raise ValueError(f"x must be at most {LIMIT}.") -> pass' in done
    assert len({m.key for m in found}) == len({m.source for m in found}) == len(found)
    for mutant in found:
        ast.parse(mutant.source)
        assert "Text.XX" not in mutant.source
        assert 1 <= mutant.first <= mutant.last <= len(SOURCE.splitlines())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code does not tell its qualified name")
def test_a_fault_is_put_into_living_functions(runner, tmp_path):
    path = tmp_path / "victim.py"
    path.write_text(SOURCE)
    by_text = {m.key.split(" | ")[1]: m.source for m in runner[0].mutants(SOURCE)}

    def victim():
        spec = importlib.util.spec_from_file_location("victim", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    for text, expected in (
        ("y * factor -> y / factor", 2.0),
        ("nested(x) + 1 -> nested(x) - 1", 3.0),
        ("1 -> 2", 6.0),
    ):
        module = victim()
        kept = module.scaled
        assert kept(2) == 5
        assert runner[1].swap(SOURCE, by_text[text], module, runner[1].living(str(path)))
        assert kept(2) == expected
    module = victim()
    assert runner[1].swap(SOURCE, by_text["3 -> 4"], module, [])
    assert module.scaled(4) == 9
    # A default value is made at the import.
    assert not runner[1].swap(SOURCE, by_text["2.0 -> 4.0"], victim(), [])


def test_every_file_named_is_there(runner):
    spec = importlib.util.spec_from_file_location("runner", Path(__file__).with_name("__main__.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop("runner", None)
    spec.loader.exec_module(module)
    for file, tests in module.TESTS.items():
        assert (ROOT / file).is_file()
        assert all((ROOT / test).exists() for test in tests)
    # Each mutant said to be equivalent is one that there is.
    for file, listed in module.equivalents().items():
        keys = {m.key for m in runner[0].mutants((ROOT / file).read_text())}
        assert set(listed) <= keys

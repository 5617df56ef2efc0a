import io
import sys
import types
from pathlib import Path

import pytest

from benchmarks.harness import loops as module
from benchmarks.harness.loops import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_now_and_then(monkeypatch, capsys):
    # A clock that goes on by a second an item.
    clock = iter(range(1000))
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress(range(25), "training")) == list(range(25))
    written = capsys.readouterr().err
    assert "\r" not in written
    lines = written.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"training: {done} of 25 steps" for done in (1, 11, 21, 25)
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(iter("abc"), "reading", 3, unit="letter")) == ["a", "b", "c"]
    assert "reading" in terminal.getvalue()
    assert "3" in terminal.getvalue()


@pytest.mark.parametrize(("unit", "units"), [("batch", "batches"), ("epoch", "epochs")])
def test_units_in_the_plural(capsys, unit, units):
    assert list(progress("ab", "features", unit=unit)) == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"features: 2 of 2 {units}, ")


def test_none_tells_nothing(capsys):
    assert list(progress("ab", None)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_an_empty_loop_says_nothing(capsys):
    assert list(progress([], "training")) == []
    assert capsys.readouterr().err == ""


def test_every_loop_of_the_benchmarks_shows_its_progress_by_it():
    root = Path(module.__file__).parents[1]
    users = [path for path in root.rglob("*.py") if "tqdm" in path.read_text()]
    assert users == [Path(module.__file__)]

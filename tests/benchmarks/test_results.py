"""Every result that is published follows the one schema."""

import json
from pathlib import Path

import pytest

from benchmarks.harness import load
from benchmarks.harness.runs import read

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*/results/**/*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_every_result_follows_the_schema(path):
    found = read(path)
    # A run of STL10 is a folder.
    if path.name != "results.json":
        folder = BENCHMARKS / path.relative_to(BENCHMARKS).parts[0] / "results"
        assert found["name"] == path.relative_to(folder).with_suffix("").as_posix()


def test_no_result_is_missed():
    assert len(FILES) > 50
    assert {path.relative_to(BENCHMARKS).parts[0] for path in FILES} >= {
        *("cache", "distillation", "plain_pytorch", "speed", "stl10")
    }


@pytest.mark.parametrize("field", ["machine", "versions", "code", "command", "date", "seed"])
def test_a_result_without_its_origin_fails(tmp_path, field):
    content = json.loads(FILES[0].read_text())
    del content[field]
    (tmp_path / "broken.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"broken\.json must have the field '{field}'"):
        load(tmp_path)

"""The README's Python snippets run, one after the other, as a reader would run them."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_every_snippet_runs_in_order(tmp_path):
    program = "\n".join(SNIPPETS)
    assert program.count('"weights": "default"') == 1
    # No download; everything else as it stands.
    program = program.replace('"weights": "default"', '"weights": None')
    (tmp_path / "readme.py").write_text(program + "\nassert torch.isfinite(loss)\n")
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_the_first_snippet_is_short():
    assert "```python" in (ROOT / "README.md").read_text()[:1500]
    assert len(SNIPPETS[0].splitlines()) <= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"python (examples/\w+\.py)", page.read_text()):
        assert (ROOT / target).exists(), target


def test_extras_are_in_setup_cfg():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = (ROOT / "README.md").read_text()
    assert "pip install 'mvmr-loss" not in text
    for extra in re.findall(r"'\.\[(\w+)\]'", text):
        assert extra in setup["options.extras_require"]

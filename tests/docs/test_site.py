"""The site is built without a warning, its tutorials are run, and their notebooks are there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.slow
def test_strict_build(tmp_path):
    pytest.importorskip("sphinx_gallery", reason="the extra docs is not installed")
    command = ["-m", "sphinx", "--nitpicky", "--fail-on-warning", "--keep-going", "docs", tmp_path]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index", "method", "hosts/lightly", "api/loss", "extending/measure", "faq"):
        assert (tmp_path / f"{page}.html").exists()
    assert "mvmr_loss.MVMRLoss" in (tmp_path / "api" / "loss.html").read_text()
    for path in TUTORIALS:
        page = (tmp_path / "gallery" / f"{path.stem}.html").read_text()
        assert f"sphx_glr_{path.stem}_001.png" in page, "it was run, and drew a picture"
        (notebook,) = tmp_path.glob(f"_downloads/*/{path.stem}.ipynb")
        assert json.loads(notebook.read_text())["nbformat"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overview.py", "tutorials/what_representations_see.py"])
def test_pictures_are_drawn_by_their_scripts(name, tmp_path):
    script = tmp_path / Path(name).name
    script.write_text((ROOT / "docs" / name).read_text())
    picture = {"overview": "overview", "what_representations_see": "representations"}[script.stem]
    command = [sys.executable, script, tmp_path / f"{picture}.png"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    size = slice(16, 24)  # width and height in a PNG's header; fonts may move them by a little
    drawn, kept = (
        (folder / f"{picture}.png").read_bytes()[size] for folder in (tmp_path, ROOT / "docs")
    )
    for place in (0, 4):
        sides = [int.from_bytes(header[place : place + 4], "big") for header in (drawn, kept)]
        assert abs(sides[0] - sides[1]) <= 0.1 * sides[1]

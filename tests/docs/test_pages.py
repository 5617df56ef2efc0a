"""The pages: their snippets run as they stand, their links lead somewhere, their errors are real."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch

from mvmr_loss import DistillationLoss, MultiRepresentationRegularizer, MVMRLoss
from mvmr_loss.dependence import registry as measures
from mvmr_loss.representations import registry as representations

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "gallery"} & {*path.parts}
)
GUIDES = sorted((ROOT / "adapters").glob("*/README.md"))
# Weights that would be downloaded are left out when a page is run; all else is as it stands.
DOWNLOAD = '"weights": "default"'


def title(path):
    return str(path.relative_to(ROOT))


def snippets(path):
    """Returns a page's Python snippets, which share a namespace."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


def test_the_readme_runs_as_a_file(tmp_path):
    program = "\n".join(snippets(README))
    (tmp_path / "readme.py").write_text(program + "\nassert torch.isfinite(loss)\n")
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_begins_with_a_whole_program(tmp_path):
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    assert "```python" in text[:1500]
    assert 20 <= len(snippets(README)[0].splitlines()) <= 30


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=title)
def test_snippets_run_in_order(page, tmp_path, monkeypatch):
    for registry in (measures, representations):
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    program = "\n".join(snippets(page))
    assert program.count(DOWNLOAD) <= 1
    if DOWNLOAD in program:
        program = program.replace(DOWNLOAD, '"weights": None')
        with pytest.warns(UserWarning, match="random weights"):
            exec(compile(program, title(page), "exec"), {"__name__": page.stem})
    else:
        exec(compile(program, title(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *PAGES, *GUIDES], ids=title)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        made = "gallery/" in target  # from docs/tutorials, when the site is built
        source = ROOT / "docs" / "tutorials" / f"{Path(target).stem}.py"
        assert source.exists() if made else (page.parent / target).exists(), target
    for target in re.findall(r"\b((?:examples|benchmarks|docs|mvmr_loss|tests)/[\w/.]*\w)", text):
        # On the adapters' pages, the folders may be the host's.
        assert page in GUIDES or target == "docs/_build" or (ROOT / target).exists(), target


@pytest.mark.parametrize("page", [README, *PAGES, *GUIDES], ids=title)
def test_extras_are_in_setup_cfg(page):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "pip install mvmr-loss" not in page.read_text(), "it is on no index"
    for extra in re.findall(r"""['"]\.\[([\w-]+)\]['"]""", page.read_text()):
        assert extra in setup["options.extras_require"]


def messages():
    """Returns the package's string constants, a formatted one in its constant parts."""
    folders = (ROOT / "mvmr_loss", ROOT / "adapters")
    for path in [path for folder in folders for path in folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_of_the_faq_are_those_of_the_code():
    rows = re.findall(r"^\| (.*?) \| .*\|$", (ROOT / "docs" / "faq.md").read_text(), re.M)
    quoted = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    said = list(messages())
    assert len(quoted) >= 12
    for part in quoted:
        assert any(part in message for message in said), part


def test_the_logging_page_has_every_name():
    z, y = torch.randn(2, 8, 4)
    losses = {
        "MVMRLoss": MVMRLoss(identity_weight=1.0, covariance_weight=1.0).forward_components(
            z, z, {"NAME": y}
        ),
        "MultiRepresentationRegularizer": MultiRepresentationRegularizer().forward_components(
            z, {"NAME": y}
        ),
        "DistillationLoss": DistillationLoss(
            4, {"NAME": 4}, dependence_weight=1.0
        ).forward_components(z, {"NAME": y}),
    }
    page = (ROOT / "docs" / "logging.md").read_text()
    for loss, found in losses.items():
        (row,) = re.findall(rf"^\| `{loss}` \| (.*) \|$", page, re.M)
        said = set(re.findall(r"`([^`]+)`", row)) - {"dependence_weight"}
        assert said == set(found.as_dict())


def test_citation_is_the_papers():
    text = (ROOT / "CITATION.cff").read_text()
    for words in ("Kinakh", "Drozdova", "Voloshynovskiy", "2303.12130", "license: MIT"):
        assert words in text

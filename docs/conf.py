"""How the site is built: `make docs`."""

from __future__ import annotations

from typing import Any

import mvmr_loss

project = "mvmr-loss"
version = release = mvmr_loss.__version__
html_title = f"mvmr-loss {version}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "tutorials"]
suppress_warnings = [
    "config.cache"
]  # the gallery's settings hold no functions, but are no plain values

# Every reference must lead somewhere, but for the types of signatures: torch's, Python's, aliases.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|obj)", ".*"),
    ("py:.*", r"(torch|nn|lightly|pytorch_lightning)\..*"),
]
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "extra_repr"}
autodoc_mock_imports = ["solo", "torchdistill"]
python_use_unqualified_type_names = True
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "min_reported_time": 10_000,
    "write_computation_times": False,
    "remove_config_comments": True,
    "nested_sections": False,
}

html_theme = "furo"
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"top_of_page_buttons": []}


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which their class describes."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip)

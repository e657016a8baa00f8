"""Sphinx's settings. `make docs` builds the site; nothing is fetched, and the site opens without a network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The tables are made from this checkout's kvhook and contracts, not from an installed one.
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]
# argparse wraps its help at the width of the terminal
os.environ["COLUMNS"] = "100"

import kvhook  # noqa: E402

project = "kvhook"
author = "the kvhook authors"
copyright = "the kvhook authors"
version = release = kvhook.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "kvhook_tables"]
exclude_patterns = ["_ext", "_static"]
nitpick_ignore_regex = [
    # other projects' classes: their sites are not asked, since a build fetches nothing
    (r"py:.*", r"(?!kvhook\b).*"),
    # names that the docstrings' types use, but that are no pages of this site
    (r"py:.*", r"kvhook\.(?!Session|Trace|install|open|attach|uninstall|VLLMMetricsCollector).*"),
]
# A word in single backquotes in a docstring is code.
default_role = "code"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"kvhook {version}"
html_static_path = ["_static"]
html_css_files = ["kvhook.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "tango"
pygments_dark_style = "monokai"

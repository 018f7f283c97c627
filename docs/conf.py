"""Build of the documentation.

Sphinx, because it reads docstrings, checks every cross-reference and turns a broken one into an error. MyST, because
the pages are then Markdown that also reads well in a repository viewer. Furo, because it is maintained, works on a
phone, and has a light and a dark theme without configuration. Docstrings are read by Sphinx's own autodoc with napoleon
(Google style): it sees inherited docstrings, which a static reader does not.

Formulas become MathML (site_math.py), by the converter that docutils brings along: no script, no fonts, nothing from
the network, and pages that are complete when they are opened as files. MathJax would come from another server; bundled
it weighs megabytes. Every browser of the last years draws MathML.

The page of each method and its drawing are made at every build (site_methods.py), since a drawing takes a fifth of a
second. Pictures of whole runs take seconds to minutes; they are drawn by figures.py and kept in _static.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gradsurgery

sys.path.insert(0, str(Path(__file__).parent))

project = "gradsurgery"
author = "The gradsurgery authors"
copyright = "The gradsurgery authors"
version = release = gradsurgery.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "site_math",
    "site_methods",
]
exclude_patterns = ["_build", "_static"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are a list in the class, not an entry each

# Names of other projects are not looked up: a build must not need the network.
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|np|scipy|matplotlib|collections|typing)\..*")]

html_theme = "furo"
html_title = "gradsurgery"
html_static_path = ["_static"]  # for the playground and the style sheet; pictures of pages are found without it
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
# Arrow keys turn gradients in the playground and scroll wide tables; they must not leave the page on the way.
html_theme_options = {"navigation_with_keys": False}


# Napoleon takes "words: more" at the start of a property's docstring for its type. Such docstrings are plain text here,
# so what was there before napoleon (priority 500) is put back after it.
docstrings: dict[str, list[str]] = {}


def remember(app, what, name, obj, options, lines):
    if what in {"attribute", "data", "property"}:
        docstrings[name] = list(lines)


def put_back(app, what, name, obj, options, lines):
    if name in docstrings:
        lines[:] = docstrings.pop(name)


def setup(app):
    app.connect("autodoc-process-docstring", remember, priority=400)
    app.connect("autodoc-process-docstring", put_back, priority=600)

"""Build of the documentation.

Sphinx, because it reads docstrings, checks every cross-reference and turns a broken one into an error. MyST, because
the pages are then Markdown that also reads well in a repository viewer. Furo, because it is maintained, works on a
phone, and has a light and a dark theme without configuration. Docstrings are read by Sphinx's own autodoc with napoleon
(Google style): it sees inherited docstrings, which a static reader does not.
"""

from __future__ import annotations

import gradsurgery

project = "gradsurgery"
author = "The gradsurgery authors"
copyright = "The gradsurgery authors"
version = release = gradsurgery.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_static"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = True
napoleon_numpy_docstring = False

# Names of other projects are not looked up: a build must not need the network.
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|np|scipy|matplotlib|collections|typing)\..*")]

html_theme = "furo"
html_title = "gradsurgery"
html_static_path = ["_static"]  # for the playground; pictures of pages are found without it

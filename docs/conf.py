"""Sphinx configuration: ``python -m sphinx -n -W --keep-going docs docs/_build/html``."""

import doctest

import calrobust

project = "calrobust"
author = "the calrobust authors"
project_copyright = f"2026, {author}"
release = calrobust.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.extlinks",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = f"calrobust {release}"
exclude_patterns = ["_build"]
templates_path = ["_templates"]

extlinks = {"arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3

doctest_default_flags = doctest.NORMALIZE_WHITESPACE  # as pytest runs them
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Names of other projects: the build must be green without a network, so their inventories cannot be fetched.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchmetrics|nn|matplotlib|pandas|numpy|transformers|lightning|collections|typing|os)(\..*)?"),
    ("py:class", r"Axes|Figure|Impl|Norm|ProcessGroup|Reduction|_Term"),  # aliases and private names in signatures
]

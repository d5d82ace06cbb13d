"""Sphinx configuration: ``make -C docs html``, or ``python -m sphinx -n -W --keep-going docs docs/_build/html``."""

import doctest
import sys
from pathlib import Path

import calrobust

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "calrobust"
author = "the calrobust authors"
project_copyright = f"2026, {author}"
release = calrobust.__version__

extensions = [
    "links",
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.extlinks",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    "swap",
]
html_theme = "furo"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_title = f"calrobust {release}"
html_static_path = ["_static"]
html_css_files = ["calrobust.css"]
html_js_files = ["sidebar.js"]
exclude_patterns = ["_build", "gallery"]
templates_path = ["_templates"]

extlinks = {"arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

doctest_default_flags = doctest.NORMALIZE_WHITESPACE  # as pytest runs them
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# docs/gallery/*.py, run at the first build and when they change; if the library changed, run `make clean` first.
# Names of functions, as Sphinx cannot keep the functions themselves.
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("matplotlib", "pictures.reset"),
    "image_srcset": ["2x"],
    "backreferences_dir": "auto_gallery/backreferences",  # pictures on the pages of the API, by _templates
    "doc_module": ("calrobust",),
    "remove_config_comments": True,
    "min_reported_time": 30,  # a page that takes longer says so, and should not
    "write_computation_times": False,
    "show_signature": False,
    "download_all_examples": False,
    "notebook_extensions": set(),
}

# Names of other projects: the build must be green without a network, so their inventories cannot be fetched.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|torchmetrics|nn|matplotlib|pandas|numpy|transformers|lightning|collections|typing|os)(\..*)?"),
    # Aliases, private names and strings in signatures.
    ("py:class", r"Axes|Figure|Impl|Norm|ProcessGroup|Reduction|Tensor|_Term"),
]

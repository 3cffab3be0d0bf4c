"""The site: MyST pages, run by myst-nb; the reference, from the docstrings by autosummary and numpydoc."""

from __future__ import annotations

import sys
from pathlib import Path

import rai_toolbox

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "rai_toolbox"
author = "the rai_toolbox authors"
copyright = f"{author}, MIT license"
version = release = rai_toolbox.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "public_names",
]
exclude_patterns = [
    "explanation/speed-table.md",
    "explanation/solvers-table.md",
    "_build",
    "jupyter_execute",
    "reference/generated/.gitignore",
]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "rai_toolbox"
html_static_path = ["_static"]
html_css_files = ["page.css"]
default_role = "code"  # docstrings write `name`

# Tutorials: every cell runs in every build, and an error in one ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Reference: one page for each public name.
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the docstrings say the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
# A docstring names only what the signature has, and begins with one line that ends in a period.
numpydoc_validation_checks = {"GL08", "SS03", "PR02"}
numpydoc_validation_exclude = {r"\.forward$"}

# docs/_ext/public_names.py: what must have a page, and what must have an example on it.
public_modules = [
    "rai_toolbox",
    "rai_toolbox.functional",
    "rai_toolbox.optim",
    "rai_toolbox.perturbations",
    "rai_toolbox.perturbations.losses",
    "rai_toolbox.robustness",
]
modules_with_examples = public_modules[:4]

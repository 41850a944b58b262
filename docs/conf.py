"""How the documentation site is built: `sphinx-build -W docs site`, after `pip install ".[docs]"`."""

import hf_efcp

project = "hf_efcp"
version = release = hf_efcp.__version__
copyright = "the authors of hf_efcp, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "hf_efcp"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

# A name in `...` in a docstring is code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autoclass_content = "both"
copybutton_exclude = ".linenos, .gp, .go"
html_static_path = ["_static"]
html_js_files = ["accessible.js"]

"""How Sphinx reads the tree that build.py has staged."""

import api

project = "mamba"
project_copyright = "the authors named in CITATION.cff, Apache-2.0"
html_title = "Mamba, read slowly and run fast"
root_doc = "index"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "sphinx-mathjax-offline"]
nitpicky = True
default_role = "literal"

nb_execution_mode = "off"  # a page shows the outputs that were committed
nb_render_markdown_format = "myst"  # outputs with tables and formulas
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 6

autodoc_inherit_docstrings = False  # not those of torch
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"
numpydoc_show_class_members = False

html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_search_summary = False  # a page opened from disk may not fetch another one
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "github-dark-high-contrast"


def setup(app):
    app.connect("autodoc-process-docstring", api.plain, priority=400)  # before numpydoc's
    app.connect("autodoc-skip-member", api.fields)
    app.connect("missing-reference", api.resolve)

"""The documentation site; `python3 -m cellop_nb docs` prepares the generated pages and builds it."""

import os
from importlib.resources import files

from docutils import nodes
from latex2mathml.converter import convert

from cellop_nb import __version__

project = "cellop_nb"
author = copyright = "the cellop_nb developers"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
bibtex_bibfiles = ["references.bib"]
copybutton_exclude = ".linenos, .gp, .go"
if os.environ.get("READTHEDOCS"):  # elsewhere the site is built without a network
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "anndata": ("https://anndata.readthedocs.io/en/stable", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
exclude_patterns = ["_build"]
suppress_warnings = [
    "mystnb.unknown_mime_type"
]  # live plots leave a picture beside what only a kernel can show

# notebooks are shown as they were committed: executed, never run here
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
napoleon_attr_annotations = False
napoleon_custom_sections = [("Attributes", "params_style")]  # several names in one entry, as for parameters
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "training"}
add_module_names = False

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "cellop_nb"
html_copy_source = False
html_static_path = ["_static", str(files("ziamath") / "fonts")]  # the font of the equations
html_css_files = ["site.css"]
smartquotes = False  # messages and code as they are typed
html_theme_options = {"source_repository": "", "navigation_with_keys": True}


def inline(self, node):
    """An equation in a line as MathML, which browsers draw themselves: no script from elsewhere."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(self, node):
    """An equation on a line of its own."""
    self.body.append(f"<div class='math'>{convert(node.astext(), display='block')}</div>")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline, None), (block, None))

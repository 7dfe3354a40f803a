"""The site: `make docs` builds it into docs/_build/html, one folder that any host serves and that needs no network."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))
# What one page has compiled, the next ones and the next build need not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(HERE / "_build" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pages
import sphinx.builders

import fmjax

# A page may take half a minute: each is read on its own, by whichever process is free.
sphinx.builders.make_chunks = lambda names, processes: [[name] for name in names]

project, author, release = "fmjax", "the fmjax authors", fmjax.__version__
copyright = f"2026, {author}"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "reference",
    "verify",
]
exclude_patterns = ["_build", "extensions"]

# Pages are Markdown whose Python runs; each has a kernel of its own and begins from nothing.
nb_custom_formats = {".md": "pages.read"}
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_execution_excludepatterns = [str(page.relative_to(HERE)) for page in HERE.rglob("*.md") if not pages.runs(page)]
nb_execution_show_tb = True
nb_output_stderr = "error"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

# MathJax from the site itself.
mathjax_path = "mathjax/tex-chtml.js"
MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"

html_theme = "furo"
html_title = "fmjax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"source_repository": "", "navigation_with_keys": True}
templates_path = []
copybutton_exclude = ".linenos, .gp"
nitpicky = True
# Its page in JAX's own site has another name.
nitpick_ignore = [("py:class", "jax.numpy.float32")]


def copy_mathjax(app, exception):
    if exception is None and app.builder.format == "html":
        for part in ("tex-chtml.js", "output/chtml", "input/tex/extensions"):
            target = Path(app.outdir) / "_static" / "mathjax" / part
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (MATHJAX / part).is_dir() else shutil.copy
            copy(MATHJAX / part, target, **({"dirs_exist_ok": True} if copy is shutil.copytree else {}))


def setup(app):
    app.connect("build-finished", copy_mathjax)

"""Sphinx's settings.

Build with ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.
"""

from __future__ import annotations

import os
from pathlib import Path

from sphinx.application import Sphinx

import robust_prune
from robust_prune import recipe_docs

DOCS = Path(__file__).parent
GENERATED = DOCS / "_generated" / "recipe.md"
ONLINE = bool(os.environ.get("ROBUST_PRUNE_DOCS_ONLINE"))
"""Whether the build may use the network: without it, a build needs none and gives the same pages everywhere."""

project = "robust-prune"
author = "robust-prune contributors"
project_copyright = author
release = robust_prune.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"robust-prune {release}"
html_static_path = ["_static"]
html_css_files = ["notebook.css"]
# Single backticks in docstrings name objects of Python where there is one, and are code where there is none.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The cache lies beside the builders' folders, so that one execution serves the pages and the check of links.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
# Warnings of other packages name folders of the machine that builds; errors end the build all the same.
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_display_short_literal_types = True
maximum_signature_line_length = 88

if ONLINE:
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
else:
    # Links between pages and to files are checked everywhere, pages of others only where they can be reached.
    linkcheck_ignore = [r"https?://"]


def _write_configuration(app: Sphinx) -> None:
    """Writes the recipe's keys for `configuration.md`, unless they are there: a new file would be read again."""
    text = recipe_docs.to_markdown(recipe_docs.describe())
    if not GENERATED.is_file() or GENERATED.read_text(encoding="utf-8") != text:
        GENERATED.parent.mkdir(exist_ok=True)
        GENERATED.write_text(text, encoding="utf-8")


def _readable_defaults(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Dataclasses show fields that are made anew as ``<factory>``, which is no Python, so that nothing is linked."""
    return signature and signature.replace("<factory>", "..."), returned


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _write_configuration)
    app.connect("autodoc-process-signature", _readable_defaults)

"""Sphinx's settings.

Build with ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

import robust_prune
from robust_prune import recipe_docs

logger = logging.getLogger(__name__)

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = Path("benchmarks", "results")
GENERATED = DOCS / "_generated"
REPOSITORY = "https://github.com/robust-prune/robust-prune/blob/main/"
ONLINE = bool(os.environ.get("ROBUST_PRUNE_DOCS_ONLINE"))
"""Whether the build may use the network: without it, a build needs none and gives the same pages everywhere."""

project = "robust-prune"
author = "robust-prune contributors"
project_copyright = author
release = robust_prune.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated/*.md"]
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

nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # arguments and values stand in single backticks, too
    ("py:class", r"(?!robust_prune\.).*"),  # torch, numpy and the standard library are known only with the network
    ("py:class", r".*\.T"),  # type variables
]

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


def _generate(app: Sphinx) -> None:
    """Writes what pages include: the keys of the recipe, and the results of the benchmarks, each as a page."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    shutil.copytree(ROOT / RESULTS, GENERATED / "results", ignore=_all_but_markdown)
    pages = sorted((GENERATED / "results").rglob("*.md"))
    names = [page.relative_to(GENERATED / "results").with_suffix("").as_posix() for page in pages]
    entries = "\n".join(f"{name} <_generated/results/{name}>" for name in names)
    (GENERATED / "results.md").write_text(f":::{{toctree}}\n{entries}\n:::\n", encoding="utf-8")
    keys = recipe_docs.to_markdown(recipe_docs.describe())
    (GENERATED / "recipe.md").write_text(keys, encoding="utf-8")


def _all_but_markdown(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (name.endswith(".md") or Path(folder, name).is_dir())]


def _link_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Links to files of the repository lead to the pages made from them; a file that is not there is a broken link."""
    pages = {"benchmarks/README.md": "benchmarks", "CHANGELOG.md": "changelog"}
    for link in list(doctree.findall(nodes.reference)):
        path, _, anchor = link.get("refuri", "").partition("#")
        if not path.startswith(REPOSITORY):
            continue
        file = Path(path.removeprefix(REPOSITORY))
        page = pages.get(file.as_posix())
        if file.suffix == ".md" and file.is_relative_to(RESULTS):
            page = (Path("_generated", "results") / file.relative_to(RESULTS).with_suffix("")).as_posix()
        if not (ROOT / file).exists():
            logger.warning("the repository has no file %s", file, location=link)
        elif page is not None:
            # What MyST makes of a link to a page, which is resolved, and missed, with the others.
            link.replace_self(
                addnodes.pending_xref(
                    "", *link.children, refdomain="doc", reftype="myst", reftarget=page, reftargetid=anchor or None,
                    refexplicit=True, refdoc=app.env.docname,
                )
            )  # fmt: skip


def _readable_defaults(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Dataclasses show fields that are made anew as ``<factory>``, which is no Python, so that nothing is linked."""
    return signature and signature.replace("<factory>", "..."), returned


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _generate)
    app.connect("doctree-read", _link_to_pages)
    app.connect("autodoc-process-signature", _readable_defaults)

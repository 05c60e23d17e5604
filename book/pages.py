"""What the pages of the book need beside their theme.

Each script once, maths without a network, words for those who don't see a plot.

It is an extension of Sphinx; `_config.yml` names it.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def once_each(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Two extensions add scripts that a third has added: a page takes each of them once."""
    seen, files = set(), []
    for file in context.get("script_files", ()):
        key = str(file.filename or ""), file.attributes.get("body")
        if key not in seen:
            seen.add(key)
            files.append(file)
    context["script_files"] = files


def describe_plots(app: Sphinx, tree: nodes.document, page: str) -> None:
    """A plot's caption says what it shows: its first sentence stands for the picture."""
    for figure in tree.findall(nodes.figure):
        for image in figure.findall(nodes.image):
            for caption in figure.findall(nodes.caption):
                image.setdefault("alt", caption.astext().partition(". ")[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx what to call."""
    app.setup_extension("sphinx-mathjax-offline")
    app.connect("html-page-context", once_each, priority=900)
    app.connect("doctree-resolved", describe_plots, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

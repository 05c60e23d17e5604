"""What the pages of the book need beside their theme.

Each script once, maths without a network, words for those who don't see a plot, terms that lead to
the glossary, a description for those who pass a page on, and each chapter's package as a file.

It is an extension of Sphinx; `_config.yml` names it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/measure"))
GLOSSARY = "book/glossary"
# Words of every day, which in most sentences are not meant as terms.
COMMON = set("context finished history hit positions program row running step waiting".split())
UNTOUCHED = (nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.math)
EXECUTED = "%executed%"  # where a page wants to say with which code each was executed
MOST_WORDS = 40  # of a page's description


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


def link_terms(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Let the first mention of each term in a chapter lead to the glossary."""
    if not page.startswith("chapters/") or app.builder.format != "html":
        return
    home = app.builder.get_relative_uri(page, GLOSSARY)
    terms = {
        name: place
        for name, _, kind, where, place, _ in app.env.get_domain("std").get_objects()
        if kind == "term" and where == GLOSSARY and name not in COMMON
    }
    for paragraph in tree.findall(nodes.paragraph):
        for text in list(paragraph.findall(nodes.Text)):
            if terms and not within(text, UNTOUCHED):
                put_links(text, terms, home)


def within(node: nodes.Node, kinds: tuple[type, ...]) -> bool:
    """Does a node lie in one of these kinds?"""
    while (node := node.parent) is not None:
        if isinstance(node, kinds):
            return True
    return False


def put_links(text: nodes.Text, terms: dict[str, str], home: str) -> None:
    """Replace the terms in a text by links, and forget them: later mentions stay as they are."""
    pieces: list[nodes.Node] = []
    rest = text.astext()
    names = "|".join(sorted(map(re.escape, terms), key=len, reverse=True))
    while match := re.search(rf"(?<![\w-])({names})(?=s?(?![\w-]))", rest, re.IGNORECASE):
        name = next(t for t in terms if t.lower() == match[1].lower())
        where = f"{home}#{terms.pop(name)}"
        link = nodes.reference("", match[1], refuri=where, internal=True, classes=["term"])
        pieces += [nodes.Text(rest[: match.start()]), link]
        rest = rest[match.end() :]
        names = "|".join(sorted(map(re.escape, terms), key=len, reverse=True)) or "(?!)"
    if pieces:
        text.parent.replace(text, [*pieces, nodes.Text(rest)])


def tell_others(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """What a search, or a link that somebody passes on, shows of a page: its first paragraph."""
    first = None if tree is None else next(tree.findall(nodes.paragraph), None)
    if first is None:
        return
    words = first.astext().split()
    text = " ".join(words[:MOST_WORDS]) + (" …" if len(words) > MOST_WORDS else "")
    tags = {"og:title": app.env.titles[page].astext(), "og:type": "article", "og:description": text}
    lines = [f'<meta name="description" content="{escape(text)}" />']
    lines += [f'<meta property="{k}" content="{escape(v)}" />' for k, v in tags.items()]
    context["metatags"] = context.get("metatags", "") + "\n".join(lines)


def pack_stages(app: Sphinx, error: Exception | None) -> None:
    """Put the package as of each chapter beside the pages, as a file to download."""
    if error is not None or app.builder.format != "html":
        return
    from stages import INIT, last, stage  # beside `bars`, which the book takes from there, too

    folder = Path(app.outdir, "stages")
    folder.mkdir(exist_ok=True)
    for number in range(1, last() + 1):
        files = {"LICENSE": (ROOT / "LICENSE").read_text("utf-8"), **INIT, **stage(number)}
        with zipfile.ZipFile(folder / f"nanovllm-{number:02}.zip", "w") as out:
            for path, text in sorted(files.items()):
                out.writestr(zipfile.ZipInfo(path), text, zipfile.ZIP_DEFLATED)  # without a time


def tell_what_ran(app: Sphinx, page: str, source: list[str]) -> None:
    """Which pages were executed with the package as it is now: a table where one is asked for."""
    if EXECUTED not in source[0]:
        return
    from execute import behind, in_words, notebooks

    app.env.note_reread()  # in each build: it is the code that may have changed
    rows = [f"| []({link(path)}) | {in_words(behind(path))} |" for path in notebooks()]
    table = "\n".join(["| page | the package that made its outputs |", "|---|---|", *rows])
    source[0] = source[0].replace(EXECUTED, table)


def link(notebook: Path) -> str:
    """From a page in book/ to a notebook."""
    folder = "" if notebook.parent.name == "book" else "../chapters/"
    return folder + notebook.name


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx what to call."""
    app.setup_extension("sphinx-mathjax-offline")
    app.connect("source-read", tell_what_ran)
    app.connect("html-page-context", once_each, priority=900)
    app.connect("html-page-context", tell_others, priority=900)
    app.connect("doctree-resolved", describe_plots, priority=900)
    app.connect("doctree-resolved", link_terms, priority=950)
    app.connect("build-finished", pack_stages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

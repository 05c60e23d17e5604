"""The book's bars: above each export cell a line says which file it goes to and what it changes.

A Sphinx extension (see `_config.yml`). A folded cell says in its fold's title what it holds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from cells import DOC, IMPORTS, Cell, Unit, names_of
from merge import Package
from stages import chapters, code, number

Bar = dict[str, list[str]]  # file -> what happens to it


def bars(cells: Iterable[Cell], chapter: str) -> dict[int, Bar]:
    """For each cell of a chapter that changes the package, by its number: what it changes.

    cells: those of the chapters up to this one.
    """
    package, found = Package(), {}
    for cell in cells:
        before = package.names() if cell.chapter == chapter else {}
        package.add(cell)
        path, deletions = cell.directives() if cell.chapter == chapter else ("", [])
        bar: Bar = {}
        for file in dict.fromkeys(file for file, *_ in deletions):
            names = {name for where, gone, _ in deletions if where == file for name in gone}
            bar[file] = [f"deletes: {short(sorted(names))}" if names else "deletes the file"]
        if path:
            old = {name: before.get((path, name)) for name in defined(cell.units())}
            bar.setdefault(path, []).extend(told(old, chapter))
        if bar:
            found[cell.number] = bar
    return found


def defined(units: Iterable[Unit]) -> list[str]:
    """The names that a cell is about: of a class that it reopens, the members."""
    names = []
    for unit in units:
        members = [name for member in unit.members for name in member.names if unit.reopens]
        inner = [f"{unit.names[0]}.{name}" for name in members if name not in DOC]
        names += inner if unit.reopens else [n for n in unit.names if n not in DOC + IMPORTS]
    return [name for name in names if name.replace(".", "").isidentifier()]


def told(old: dict[str, Unit | None], chapter: str) -> list[str]:
    """What becomes of names, each given with what it meant before."""
    new = [name for name, unit in old.items() if not unit]
    replaced: dict[str, list[str]] = {}
    for name, unit in old.items():
        if unit:
            where = f"chapter {number(unit.chapter)}" if unit.chapter != chapter else "above"
            replaced.setdefault(where, []).append(name)
    groups = ", ".join(f"{short(names)} ({where})" for where, names in replaced.items())
    # What is replaced can't be seen in the cell: it comes first, lest a long line hides it.
    return [f"replaces: {groups}"] * bool(groups) + [f"new: {short(new)}"] * bool(new)


def short(names: Iterable[str]) -> str:
    """Names in a row; a class is written before the first of its members only."""
    shown, above = [], ""
    for name in names:
        owner, dot, member = name.rpartition(".")
        shown.append(dot + member if dot and owner == above else name)
        above = owner
    return ", ".join(shown)


def line(bar: Bar) -> str:
    """A bar as text."""
    return " · ".join(part for file, parts in bar.items() for part in (file, *parts))


def title(source: str) -> str:
    """What a folded cell holds that exports nothing: its first comment, else its names."""
    for text in source.split("\n"):
        if text.startswith("# "):
            return text.removeprefix("# ")
    try:
        nodes = ast.parse(source).body
    except SyntaxError:  # a magic
        nodes = []
    names = [name for node in nodes for name in names_of(node) if name not in IMPORTS]
    return ", ".join(dict.fromkeys(names)) or "code"


def mark(app: Any, doctree: Any) -> None:
    """Put the bars into a page, and the titles on its folds."""
    from docutils import nodes

    page = Path(app.env.doc2path(app.env.docname))
    mine = page.suffix == ".ipynb" and page in chapters(page.parent)
    found = bars(code(number(page), page.parent), page.name) if mine else {}
    for path in chapters(page.parent) if mine else []:  # a change there can change a bar here
        app.env.note_dependency(str(path))
    for node in list(doctree.findall(nodes.container)):
        if node.get("nb_element") != "cell_code":
            continue
        bar = found.get(node["cell_index"] + 1)
        if node.get("hide_mode") in ("input", "all"):
            text = line(bar) if bar else title(node.children[0].astext())
            node["prompt_show"] = node["prompt_hide"] = text
        elif bar:
            html = f'<p class="export-bar" title="{escape(line(bar))}">{escape(line(bar))}</p>'
            node.parent.insert(node.parent.index(node), nodes.raw("", html, format="html"))


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("doctree-read", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

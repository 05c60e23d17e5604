"""Write the package out of the chapters, and run a chapter on the package that it edits.

A notebook cell that begins with `#| export: nanovllm/…/x.py` belongs to that module, and
`#| delete: nanovllm/…/x.py::name, Class.member` removes names. Cells are merged by name, in order.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import difflib
import html
import importlib.metadata
import importlib.util
import json
import linecache
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.machinery import PathFinder
from itertools import takewhile
from operator import attrgetter
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE, INIT, WIDTH = "nanovllm", "nanovllm/__init__.py", 100
MARK = re.compile(r"^#\|\s*(export|delete)\b", re.MULTILINE)
PATH = r"(nanovllm/(?:\w+/)*\w+\.py)"
DIRECTIVE = re.compile(rf"#\|\s*(?:export:\s*{PATH}|delete:\s*{PATH}(?:::(.+))?)\s*")
DEFS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
RANK = {"__doc__": 0, "import": 1, "if TYPE_CHECKING": 2, "if __name__ == '__main__'": 4}


class TangleError(Exception):
    """The chapters cannot be merged: the message names the chapter, the cell and the line."""


@dataclass(frozen=True)
class Unit:
    """One statement as written, under the names that it defines (`a, b = 1, 2` is one unit)."""

    names: tuple[str, ...]  # empty where the merge has no name for it
    lead: str  # comments above that stand apart: they outlive a replacement
    text: str  # whole lines, decorators and adjoining comments included; of a class, its head
    gap: int  # blank lines above
    node: ast.stmt
    chapter: int = 0
    members: tuple[Unit, ...] = ()

    @property
    def reopens(self) -> bool:
        """Whether this is `class X(X):`."""
        bases = getattr(self.node, "bases", [])
        return any(isinstance(b, ast.Name) and b.id in self.names for b in bases)

    @property
    def rank(self) -> int:
        """The order in a module or class: docstring, imports, type-only imports, names, main."""
        return RANK.get(self.names[0], 3) if self.names else 3


def _names(node: ast.stmt) -> tuple[str, ...]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return ("import",)
    if isinstance(node, DEFS):
        return (node.name,)
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = getattr(node, "targets", None) or [node.target]
        targets = [t for target in targets for t in getattr(target, "elts", [target])]
        plain = all(isinstance(t, ast.Name) for t in targets)
        return tuple(t.id for t in targets) if plain else ()
    if type(node).__name__ == "TypeAlias":  # Python 3.12
        return (node.name.id,)
    name = ast.unparse(node).split(":\n")[0].replace("typing.", "")
    return (name,) if name in RANK else ()


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def _continues(node: ast.stmt, above: ast.stmt) -> bool:
    """Whether a statement belongs to the one above: `@x.setter` to `x`, a string to a field."""
    if isinstance(node, DEFS) and isinstance(above, DEFS) and node.name == above.name:
        return any(ast.unparse(d).startswith(f"{node.name}.") for d in node.decorator_list)
    return _is_string(node) and isinstance(above, ast.Assign | ast.AnnAssign)


def _start(node: ast.stmt) -> int:
    """The index of a statement's first line."""
    return min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1


def split(lines: list[str], body: list[ast.stmt], at: int, stop: int, chapter: int) -> list[Unit]:
    """Cut `lines[at:stop]`, whose statements are `body`, into units; no comment is lost."""
    units: list[Unit] = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        start, end = _start(node), node.end_lineno if following else stop
        for i in range(end, _start(following) if following else stop):
            indent = len(lines[i]) - len(lines[i].lstrip())
            if lines[i].strip() and indent <= node.col_offset:
                break
            end = i + 1 if lines[i].strip() else end  # a comment that ends a function
        above = lines[at:start]
        apart = max((i for i, line in enumerate(above, 1) if not line.strip()), default=0)
        lead = "\n".join(above[:apart]).strip("\n")
        gap = len(list(takewhile(lambda line: not line.strip(), above)))
        head, members = end, []
        if isinstance(node, ast.ClassDef) and node.body[0].lineno > node.lineno:
            head = _start(node.body[0])
            while lines[head - 1].strip()[:1] in ("", "#"):
                head -= 1
            members = split(lines, node.body, head, end, chapter)
        text = "\n".join([*above[apart:], *lines[start:head]]).rstrip()
        names = ("__doc__",) if _is_string(node) and node is body[0] else _names(node)
        names = names if start >= at else ()  # two statements on one line
        if units and _continues(node, units[-1].node):
            text = units[-1].text + "\n" * (gap + 1) + text
            units[-1] = replace(units[-1], text=text)
        else:
            units.append(Unit(names, lead, text, gap, node, chapter, tuple(members)))
        at = end
    return units


def join(units: Iterable[Unit], blank: int) -> str:
    """Units as source, with `blank` lines around functions and classes."""
    text, above = "", None
    for unit in units:
        defs = isinstance(unit.node, DEFS)
        gap = min(unit.gap, blank)
        if above and (isinstance(above.node, DEFS) or defs and not unit.lead):
            gap = blank
        elif above and (above.rank < 3 or unit.rank < 3 or defs):
            gap = 1
        text += "\n" * (gap + 1) if above else ""
        text += unit.lead + "\n" * ((blank if defs else 1) + 1) if unit.lead else ""
        text += unit.text + ("\n" + join(unit.members, 1) if unit.members else "")
        above = unit
    return text


def merge(old: Iterable[Unit], new: Iterable[Unit], cell: Cell) -> list[Unit]:
    """Put `new` into `old` by name: in place of the same name, or beside the cell's neighbour."""
    units, new, seen = list(old), list(new), set()
    for i, unit in enumerate(new):
        line, names = unit.node.lineno, set(unit.names)
        if not names:
            raise cell.error(line, "only imports, definitions and assignments can be exported")
        if names & seen:
            raise cell.error(line, f"{unit.names[0]} is defined twice in one cell")
        seen |= names
        same = [j for j, u in enumerate(units) if names & set(u.names)]
        if unit.reopens:
            if not same or not units[same[0]].members:
                raise cell.error(line, f"there is no class {unit.names[0]} to reopen here")
            if len(unit.node.bases) + len(unit.node.keywords) > 1:
                raise cell.error(line, "a reopened class keeps its bases: restate it whole")
            for n in ast.walk(unit.node):
                if isinstance(n, ast.Name) and n.id in ("super", "__class__"):
                    raise cell.error(n.lineno, f"{n.id} in a reopened class: restate it whole")
            target = units[same[0]]
            units[same[0]] = replace(target, members=tuple(merge(target.members, unit.members, cell)))
        elif same:
            rest = {n for j in same for n in units[j].names} - names
            if rest:
                raise cell.error(line, f"{min(rest)} is assigned together: restate it too")
            first = units[same[0]]
            units[same[0]] = replace(unit, lead=unit.lead or first.lead, gap=first.gap)
            units = [u for j, u in enumerate(units) if j not in same[1:]]
        else:
            place = {n: j for j, u in enumerate(units) if u.rank == 3 for n in u.names}
            later = [place[n] for u in new[i + 1 :] for n in u.names if n in place]
            if later:  # takes the neighbour's gap, and leaves it the one they have in the cell
                at, anchor = later[0], units[later[0]]
                unit = replace(unit, gap=anchor.gap)
                units[at] = replace(anchor, gap=new[i + 1].gap)
            else:
                at = place.get(new[i - 1].names[0], -1) + 1 if i else 0
                at, unit = at or len(units), unit if at else replace(unit, gap=max(1, unit.gap))
            units.insert(at, unit)
    return sorted(units, key=lambda u: u.rank)


Imports = dict[tuple[str, str, str], str]  # (module or "", name, asname or "") → comment beside


def imports_of(unit: Unit, cell: Cell) -> Imports:
    """The names that one import statement of a cell brings, except from its own target."""
    node, found = unit.node, {}
    module = getattr(node, "module", None) or ""
    if unit.text.lstrip().startswith("#") or unit.lead:
        raise cell.error(node.lineno, "imports are sorted: put the comment beside, not above")
    if getattr(node, "level", 0) or node.names[0].name == "*":
        raise cell.error(node.lineno, "neither `from .` nor `import *` can be exported")
    if module == cell.export[: -len(".py")].removesuffix("/__init__").replace("/", "."):
        return {}
    lines = unit.text.split("\n")  # an import holds no string, so its first # is a comment
    for alias in node.names:
        _, mark, comment = lines[alias.lineno - node.lineno].partition("#")
        found[module, alias.name, alias.asname or ""] = mark + comment
    return found


def _bound(key: tuple[str, str, str]) -> str:
    return key[2] or (key[1] if key[0] else key[1].split(".")[0])


def _natural(name: str) -> tuple:
    parts = re.split(r"(\d+)", name.lower())
    return [int(p) if p.isdigit() else p for p in parts], name


def _member_order(name: str) -> tuple:
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return kind, _natural(name)


def render_imports(imports: Imports) -> str:
    """Import statements in the order and layout of `ruff check --select I` and `ruff format`."""
    statements: dict[tuple, list] = {}
    for (module, name, asname), comment in imports.items():
        root = (module or name).split(".")[0]
        group = 1 if root in sys.stdlib_module_names else 3 if root == PACKAGE else 2
        alone = (name, asname) if asname or not module else ("", "")
        key = (0 if root == "__future__" else group, module, *alone)
        statements.setdefault(key, []).append((_member_order(name), name, comment))
    rows = []
    for (group, module, _, asname), members in statements.items():
        members.sort()
        head = f"from {module} import " if module else "import "
        tail = f" as {asname}" if asname else ""
        text = head + ", ".join(name for _, name, _ in members) + tail
        if len(members) == 1 and (len(text) <= WIDTH or not module):
            text += f"  {members[0][2]}".rstrip()
        elif len(text) > WIDTH or any(comment for *_, comment in members):
            inner = [f"    {name}{tail},  {comment}".rstrip() for _, name, comment in members]
            text = "\n".join([f"{head}(", *inner, ")"])
        order = (bool(module), _natural(module or members[0][1]), members[0][0], asname)
        rows.append((group, order, text))
    rows.sort()
    text = ""
    for above, row in zip([None, *rows], rows, strict=False):
        text += ("\n\n" if above[0] != row[0] else "\n") * bool(above) + row[2] if above else row[2]
    return text

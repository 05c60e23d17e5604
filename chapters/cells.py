"""Export cells and the statements in them, cut from the source as written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

PACKAGE = "nanovllm"
PATH = rf"({PACKAGE}/(?:\w+/)*\w+\.py)"
DIRECTIVE = re.compile(rf"#\|\s*(?:export:\s*{PATH}|delete:\s*{PATH}(?:::([\w., ]+))?)\s*$")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# What has a fixed place in a module: these open it, and the guard closes it.
DOC, IMPORTS = ("__doc__",), ("import",)
RANK: dict[tuple[str, ...], int] = {
    DOC: 0,
    IMPORTS: 1,
    ("if TYPE_CHECKING",): 2,
    ("if __name__ == '__main__'",): 4,
}
BODY = 3


class TangleError(Exception):
    """The chapters cannot be merged; the message names the chapter, the cell and the line."""


@dataclass(frozen=True)
class Unit:
    """A statement under the names that it defines, `a, b = 1, 2` under two."""

    names: tuple[str, ...]  # empty where it has none that could be merged
    lead: str  # comments above that stand apart: they outlive a replacement of the unit
    text: str  # whole lines, with decorators and the comments directly above; of a class, its head
    gap: int = 1  # blank lines above, as written
    node: ast.stmt | None = None
    chapter: str = ""
    members: tuple[Unit, ...] = ()  # of a class

    @property
    def reopens(self) -> bool:
        """Is it `class X(X):`?"""
        bases = getattr(self.node, "bases", [])
        return any(getattr(base, "id", None) in self.names for base in bases)

    @property
    def line(self) -> int:
        """The line of its cell that it begins in."""
        return self.node.lineno if self.node else 1

    @property
    def rank(self) -> int:
        return RANK.get(self.names, BODY)


def named(units: Iterable[Unit], prefix: str = "") -> Iterator[tuple[str, Unit]]:
    """Every name and Class.member, with its unit."""
    for unit in units:
        for name in unit.names if unit.names != DOC else ():
            yield prefix + name, unit
            yield from named(unit.members, f"{prefix}{name}.")


def join(units: Iterable[Unit], blank: int) -> str:
    """The text of units; `blank` lines stand around every function and class."""
    text, above = "", None
    for unit in units:
        defines = isinstance(unit.node, DEFINITIONS)
        if above is None:
            gap = 0
        elif isinstance(above.node, DEFINITIONS) or defines and not unit.lead:
            gap = blank
        elif above.rank < BODY:
            gap = 1
        else:
            gap = min(max(unit.gap, bool(unit.lead)), blank)
        lead = unit.lead + "\n" * (blank + 1 if defines else 2) if unit.lead else ""
        text += "\n" * gap + lead + unit.text + "\n" + join(unit.members, 1)
        above = unit
    return text


def names_of(node: ast.stmt) -> tuple[str, ...]:
    """The names that a statement defines; none where it may not be exported."""
    if isinstance(node, DEFINITIONS):
        return (node.name,)
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [t for target in targets for t in getattr(target, "elts", [target])]
        return tuple(n.id for n in names) if all(isinstance(n, ast.Name) for n in names) else ()
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return IMPORTS
    header = (ast.unparse(node).split(":\n")[0].replace("typing.", ""),)
    return header if header in RANK else ()


def is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def first_line(node: ast.stmt) -> int:
    """The index of a statement's first line, decorators included."""
    return min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1


@dataclass(frozen=True)
class Cell:
    """A code cell and where it stands; `number` counts all cells of the notebook, from 1."""

    source: str
    chapter: str
    number: int

    def error(self, line: int, message: str) -> TangleError:
        return TangleError(f"{self.chapter}, cell {self.number}, line {line}: {message}")

    def directives(self) -> tuple[str, list[tuple[str, set[str], int]]]:
        """The module that it exports to, if any, and its deletions as (module, names, line)."""
        target, deletions, top = "", [], True
        for number, line in enumerate(self.source.split("\n"), start=1):
            marked = line.startswith("#|")
            top = top and marked
            match = DIRECTIVE.match(line)
            if marked and (not top or not match or match[1] and target):
                rule = "stands at the top of its cell, with at most one export"
                raise self.error(number, f"a directive {rule}, not so: {line}")
            if match:
                target = match[1] or target
            if match and match[2]:
                deletions.append((match[2], set(re.findall(r"[\w.]+", match[3] or "")), number))
        return target, deletions

    def units(self) -> tuple[Unit, ...]:
        """The statements of the cell; every one of them can be exported."""
        return cut(self)

    def check(self, units: Iterable[Unit]) -> None:
        """Units that are merged have names, each its own."""
        seen: set[str] = set()
        for unit in units:
            if not unit.names:
                what = "only imports, functions, classes and assignments are exported"
                raise self.error(unit.line, f"{what}, each on lines of its own")
            if unit.names != IMPORTS and seen & {*unit.names}:
                raise self.error(unit.line, f"{unit.names[0]} is defined twice in one cell")
            seen |= {*unit.names}

    def split(self, lines: list[str], body: list[ast.stmt], start: int, stop: int) -> list[Unit]:
        """Cut lines[start:stop], whose statements are `body`, into units; no comment gets lost."""
        units: list[Unit] = []
        tops = [first_line(node) for node in body]
        for node, top, below in zip(body, tops, [*tops[1:], stop]):
            deeper = re.compile(rf"\s{{{node.col_offset + 1}}}")  # a comment that belongs to it
            ends = [i for i in range(node.end_lineno or 0, below) if deeper.match(lines[i])]
            end = stop if node is body[-1] else max(ends, default=(node.end_lineno or 0) - 1) + 1
            names = DOC if is_string(node) and node is body[0] else names_of(node)
            if top < start:  # two statements share a line
                names = ()
            while top > start and lines[top - 1].strip():
                top -= 1
            lead = "".join(f"{line}\n" for line in lines[start:top])
            gap = len(lead) - len(lead.lstrip("\n"))
            head, members = end, []
            if isinstance(node, ast.ClassDef) and node.body[0].lineno > node.lineno:
                head = first_line(node.body[0])
                while lines[head - 1].strip()[:1] in ("", "#"):
                    head -= 1
                members = self.split(lines, node.body, head, end)
            text = "\n".join(lines[top:head]).rstrip()
            above = units[-1].node if units else None
            setter = isinstance(node, DEFINITIONS) and node.name == getattr(above, "name", None)
            if setter or is_string(node) and isinstance(above, (ast.Assign, ast.AnnAssign)):
                text = units[-1].text + "\n" * (gap + 1) + text
                units[-1] = replace(units[-1], text=text)
            else:
                unit = Unit(names, lead.strip("\n"), text, gap, node, self.chapter, tuple(members))
                units.append(unit)
            start = end
        return units


@cache  # a notebook asks for all cells again and again
def cut(cell: Cell) -> tuple[Unit, ...]:
    """A cell's statements; TangleError where one of them can't be exported."""
    try:
        body = ast.parse(cell.source).body
    except SyntaxError as error:
        raise cell.error(error.lineno or 1, f"does not parse: {error.msg}") from None
    lines = cell.source.split("\n")
    units = cell.split(lines, body, sum(line.startswith("#|") for line in lines), len(lines))
    cell.check(units)
    return tuple(units)

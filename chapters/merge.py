"""Merge export cells, chapter after chapter, into the modules of a package, name by name."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from cells import BODY, IMPORTS, PACKAGE, Cell, Unit, join, named

WIDTH = 100


def merge(old: Iterable[Unit], new: Sequence[Unit], cell: Cell) -> list[Unit]:
    """Replace what has the same name where it stands; put a new name beside its neighbour."""
    units = list(old)
    for i, unit in enumerate(new):
        same = [u for u in units if {*u.names} & {*unit.names}]
        if lost := {name for u in same for name in u.names} - {*unit.names}:
            message = f"{min(lost)} was assigned together with it: restate both"
            raise cell.error(unit.line, message)
        at = units.index(same[0]) if same else place(units, new, i)
        if unit.reopens:
            unit = weave(same[0] if same else None, unit, cell)
        elif same:
            gap = unit.gap if i else same[0].gap  # the first of a cell has no layout of its own
            unit = replace(unit, lead=unit.lead or same[0].lead, gap=gap)
        units = [u for u in units if u not in same]
        units.insert(at, unit)
    return sorted(units, key=lambda unit: unit.rank)


def place(units: list[Unit], new: Sequence[Unit], i: int) -> int:
    """Where `new[i]` goes: before the next known name, else after the previous, else at the end."""
    known = {name: j for j, u in enumerate(units) if u.rank == BODY for name in u.names}
    above = [known[name] + 1 for u in new[:i] for name in u.names if name in known]
    below = [known[name] for u in new[i + 1 :] for name in u.names if name in known]
    fields = []
    node = new[i].node
    if isinstance(node, ast.AnnAssign) and node.col_offset:
        fields = [j + 1 for j, u in enumerate(units) if isinstance(u.node, ast.AnnAssign)]
    return [*below[:1], *above[-1:], *fields[-1:], len(units)][0]


def weave(old: Unit | None, new: Unit, cell: Cell) -> Unit:
    """The old class with the members of the reopening, which gives nothing else."""
    line, name, body = new.line, new.names[0], new.node
    if not (old and old.members and new.members and isinstance(body, ast.ClassDef)):
        raise cell.error(line, f"{name} is reopened, but there is no class {name} with a body")
    if len(body.bases) + len(body.keywords) > 1:
        raise cell.error(line, f"{name} keeps its bases when reopened: to change them, restate it")
    for node in ast.walk(body):
        if isinstance(node, ast.Name) and node.id == "super":
            raise cell.error(node.lineno, "super() would mean another class once it is merged")
    cell.check(new.members)
    return replace(old, members=tuple(merge(old.members, new.members, cell)))


def without(units: Iterable[Unit], names: set[str], prefix: str = "") -> list[Unit]:
    """Units without some names and members."""
    left = []
    for unit in units:
        if not unit.names or not {prefix + name for name in unit.names} <= names:
            members = without(unit.members, names, f"{prefix}{''.join(unit.names)}.")
            left.append(replace(unit, members=tuple(members)))
    return left


def order(name: str) -> tuple:
    """isort's: constants, classes, the rest; without regard to case, and a9 before a10."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name.lower())], name


def render_imports(imports: Iterable[tuple[str, str, str, str]]) -> str:
    """Import statements in the order and the layout of ruff's isort rule and formatter."""
    statements: dict[tuple[str, str], list[tuple]] = {}
    for source, name, alias, comment in imports:
        shown = f"{name} as {alias}" if alias else name
        alone = shown if alias or not source else ""  # a statement of its own
        statements.setdefault((source, alone), []).append((order(name), shown, comment))
    rows = []
    for (source, alone), members in statements.items():
        members.sort()
        head = f"from {source} import " if source else "import "
        text = head + ", ".join(shown for _, shown, _ in members)
        if source and (len(text) > WIDTH or len(members) > 1 and any(c for *_, c in members)):
            inner = [f"    {shown},  {comment}".rstrip() for _, shown, comment in members]
            text = "\n".join([f"{head}(", *inner, ")"])
        else:
            text = f"{text}  {members[0][2]}".rstrip()
        module = source or alone.split()[0]
        root = module.split(".")[0]
        kind = 1 if root in sys.stdlib_module_names else 3 if root == PACKAGE else 2
        kind = 0 if root == "__future__" else kind
        rows.append((kind, bool(source), order(module)[1:], members[0][0], alone, text))
    rows.sort()
    blocks = [[row[-1] for row in rows if row[0] == kind] for kind in range(4)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


@cache
def mentioned(source: str) -> set[object]:
    """The names that a module uses, and its constants, which can be names, too, as in __all__."""
    nodes = list(ast.walk(ast.parse(source)))
    names: set[object] = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.value for node in nodes if isinstance(node, ast.Constant)}


def dotted(path: str) -> str:
    """nanovllm/engine/x.py → nanovllm.engine.x"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass
class Module:
    """A module of the package while it is being merged."""

    path: str
    imports: dict[str, tuple] = field(default_factory=dict)  # bound name -> for render_imports
    units: list[Unit] = field(default_factory=list)

    @property
    def keeps_imports(self) -> bool:
        """In a package's `__init__.py` they are the point."""
        return self.path.endswith("__init__.py")

    def add_import(self, unit: Unit, cell: Cell) -> None:
        """Unite an import statement with the others; one from the module itself is dropped."""
        node, source = unit.node, getattr(unit.node, "module", None) or ""
        assert isinstance(node, ast.Import | ast.ImportFrom)
        lines = unit.text.split("\n")
        if getattr(node, "level", 0) or node.names[0].name == "*":
            raise cell.error(node.lineno, "relative and star imports can't be exported")
        if unit.lead or lines[0].startswith("#"):
            raise cell.error(node.lineno, "imports get sorted: put the comment beside, not above")
        for alias in node.names if source != dotted(self.path) else ():
            line = lines[alias.lineno - node.lineno]
            comment = re.search("#.*", line) or re.search("#.*", lines[0])
            key, text = alias.asname or alias.name, comment[0] if comment else ""
            self.imports[key] = source, alias.name, alias.asname or "", text

    def render(self) -> str:
        """The module's source."""
        used = mentioned(join(self.units, 2))
        imports = [
            (source, name, alias, comment)
            for key, (source, name, alias, comment) in self.imports.items()
            if self.keeps_imports
            or key.split(".")[0] in used
            or source == "__future__"
            or "noqa: F401" in comment
        ]
        block = [Unit(IMPORTS, "", render_imports(imports))] if imports else []
        return join(sorted(block + self.units, key=lambda unit: unit.rank), 2)


class Package:
    """The package that some cells leave."""

    def __init__(self, cells: Iterable[Cell] = ()):
        self.modules: dict[str, Module] = {}
        self.count: Counter[tuple[str, str]] = Counter()  # of definitions of (path, name)
        for cell in cells:
            self.add(cell)

    def add(self, cell: Cell) -> None:
        """Merge a cell; one without a directive changes nothing."""
        path, deletions = cell.directives()
        for deletion in deletions:
            self.remove(*deletion, cell)
        units = cell.units() if path or deletions else ()
        if not path and units:
            raise cell.error(units[0].line, "a cell that only deletes holds no code")
        if not path:
            return
        module = self.modules.setdefault(path, Module(path))
        body = [unit for unit in units if unit.names != IMPORTS]
        for unit in units:
            if unit.names == IMPORTS:
                module.add_import(unit, cell)
        if body and units[0].names == IMPORTS:
            body[0] = replace(body[0], gap=1)
        module.units = merge(module.units, body, cell)
        for name, unit in named(body):
            module.imports.pop(name, None)
            self.count[path, name] += not unit.reopens

    def remove(self, path: str, names: set[str], line: int, cell: Cell) -> None:
        """Carry out a `delete` directive; a module that is empty afterwards goes."""
        module = self.modules.get(path) or Module(path)
        left = without(module.units, names)
        before, after = ({name for name, _ in named(units)} for units in (module.units, left))
        missing = names - (before - after) - {*module.imports}
        if missing or path not in self.modules:
            raise cell.error(line, f"there is no {min(missing, default=path)} to delete")
        module.units = left
        module.imports = {k: v for k, v in module.imports.items() if k not in names}
        if not names or not after and not (module.keeps_imports and module.imports):
            del self.modules[path]

    def names(self) -> dict[tuple[str, str], Unit]:
        """(path, name or Class.member) -> where it is defined."""
        modules = self.modules.items()
        return {(path, name): u for path, module in modules for name, u in named(module.units)}

    def sources(self) -> dict[str, str]:
        """Path -> source of every module."""
        return {path: module.render() for path, module in sorted(self.modules.items())}

"""Write the package out of the chapters, and run a chapter on the package that it edits.

A code cell whose first line is `#| export: nanovllm/…/x.py` belongs to that module, and one with
`#| delete: nanovllm/…/x.py::name, Class.member` removes names. Cells merge by name, in order.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import difflib
import html
import importlib
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
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
PACKAGE, WIDTH, MOST_DEFINITIONS = "nanovllm", 100, 3
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ASSIGNMENTS = (ast.Assign, ast.AnnAssign)
IMPORTS = (ast.Import, ast.ImportFrom)
PATH = rf"({PACKAGE}/(?:\w+/)*\w+\.py)"
DIRECTIVE = re.compile(rf"#\|\s*(?:export:\s*{PATH}|delete:\s*{PATH}(?:::([\w., ]+))?)\s*$")
MARK = re.compile(r"^#\|\s*(?:export|delete)\b", re.MULTILINE)
# What has a fixed place: the docstring and type-only imports open a module, the guard closes it.
RANK = {"__doc__": 0, "if TYPE_CHECKING": 1, "if __name__ == '__main__'": 3}


class TangleError(Exception):
    """The chapters cannot be merged; the message names the chapter, the cell and the line."""


@dataclass(frozen=True)
class Cell:
    """A code cell and where it stands. `line` of an error counts within the cell, from 1."""

    source: str
    chapter: str
    number: int  # among all cells of the notebook, from 1

    def error(self, line: int, message: str) -> TangleError:
        return TangleError(f"{self.chapter}, cell {self.number}, line {line}: {message}")

    def directives(self) -> list[tuple[str, str, list[str], int]]:
        """The lines at the top as (target of an export, module to delete from, names, line)."""
        found, lines = [], self.source.split("\n")
        top = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
        for number, line in enumerate(lines, start=1):
            match = DIRECTIVE.match(line)
            if number > top and MARK.match(line):
                raise self.error(number, "a directive stands at the top of its cell")
            if number <= top and (not match or match[1] and any(target for target, *_ in found)):
                raise self.error(number, f"not a directive: {line}")
            if number <= top:
                names = [name.strip() for name in (match[3] or "").split(",")]
                found.append((match[1] or "", match[2] or "", list(filter(None, names)), number))
        return found

    def body(self) -> list[ast.stmt]:
        try:
            return ast.parse(self.source).body
        except SyntaxError as error:
            raise self.error(error.lineno or 1, f"does not parse: {error.msg}") from None

    def units(self) -> list[Unit]:
        """The statements of the cell; every one of them can be exported."""
        lines = self.source.split("\n")
        units = split(lines, self.body(), len(self.directives()), len(lines))
        for unit in units:
            if not unit.names:
                what = "only imports, functions, classes and assignments are exported"
                raise self.error(unit.node.lineno, f"{what}, each on lines of its own")
        return units


@dataclass(frozen=True)
class Unit:
    """A statement as written, under the names that it defines (`a, b = 1, 2` is one unit)."""

    names: tuple[str, ...]  # empty where it has none that could be merged
    lead: str  # comments above that stand apart: they outlive a replacement of the unit
    text: str  # whole lines, with decorators and the comments directly above; of a class, its head
    gap: int  # blank lines above, as written
    node: ast.stmt
    members: tuple[Unit, ...] = ()  # of a class

    @property
    def reopens(self) -> bool:
        """Is it `class X(X):`?"""
        bases = getattr(self.node, "bases", [])
        return any(isinstance(b, ast.Name) and b.id in self.names for b in bases)

    @property
    def rank(self) -> int:
        return RANK.get(self.names[0], 2) if self.names else 2


@dataclass
class Module:
    """A module of the package while it is being merged."""

    imports: dict[tuple[str, str, str], str] = field(default_factory=dict)  # value: its comment
    units: list[Unit] = field(default_factory=list)


# ---- Source text <-> units ----


def names_of(node: ast.stmt) -> tuple[str, ...]:
    """The names that a statement defines; empty for a statement that may not be exported."""
    if isinstance(node, DEFINITIONS):
        return (node.name,)
    if isinstance(node, ASSIGNMENTS):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [t for target in targets for t in getattr(target, "elts", [target])]
        return tuple(n.id for n in names) if all(isinstance(n, ast.Name) for n in names) else ()
    if isinstance(node, IMPORTS):
        return (f"import in line {node.lineno}",)
    if type(node).__name__ == "TypeAlias":  # Python 3.12
        return (node.name.id,)
    header = ast.unparse(node).split(":\n")[0].replace("typing.", "")
    return (header,) if isinstance(node, ast.If) and header in RANK else ()


def is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def continues(node: ast.stmt, above: ast.stmt) -> bool:
    """Does it belong to the statement above: `@x.setter` to `x`, a string to the field it is of?"""
    if isinstance(node, DEFINITIONS) and getattr(above, "name", None) == node.name:
        return any(ast.unparse(d).startswith(f"{node.name}.") for d in node.decorator_list)
    return is_string(node) and isinstance(above, ASSIGNMENTS)


def first_line(node: ast.stmt) -> int:
    """The index of a statement's first line, decorators included."""
    return min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1


def end_line(lines: list[str], node: ast.stmt, stop: int) -> int:
    """The index after a statement and the comments that are indented below it."""
    end = node.end_lineno
    for i in range(end, stop):
        if lines[i].strip() and len(lines[i]) - len(lines[i].lstrip()) <= node.col_offset:
            break
        end = i + 1 if lines[i].strip() else end
    return end


def split(lines: list[str], body: list[ast.stmt], start: int, stop: int) -> list[Unit]:
    """Cut `lines[start:stop]`, whose statements are `body`, into units; no comment gets lost."""
    units: list[Unit] = []
    for i, node in enumerate(body):
        following = body[i + 1] if i + 1 < len(body) else None
        above = first_line(node)
        end = end_line(lines, node, first_line(following)) if following else stop
        lead = lines[start:above]
        apart = max((i for i, line in enumerate(lead, start=1) if not line.strip()), default=0)
        gap = next((i for i, line in enumerate(lead) if line.strip()), len(lead))
        head, members = end, []
        if isinstance(node, ast.ClassDef):
            first = first_line(node.body[0])
            while lines[first - 1].strip()[:1] in ("", "#"):
                first -= 1
            if first > node.lineno - 1:  # not so in `class X(Y): ...`
                head, members = first, split(lines, node.body, first, end)
        names = ("__doc__",) if is_string(node) and node is body[0] else names_of(node)
        if above < start or following and following.lineno == node.end_lineno:
            names = ()  # two statements share a line, so neither can be taken without the other
        text = "\n".join([*lead[apart:], *lines[above:head]]).rstrip()
        if units and continues(node, units[-1].node):
            text = units[-1].text + "\n" * (gap + 1) + text
            units[-1] = replace(units[-1], text=text)
        else:
            apart_text = "\n".join(lead[:apart]).strip("\n")
            units.append(Unit(names, apart_text, text, gap, node, tuple(members)))
        start = end
    return units


def join(units: Iterable[Unit], blank: int) -> str:
    """The text of units; `blank` lines stand around every function and class."""
    text, above = "", None
    for unit in units:
        gap, defines = min(unit.gap, blank), isinstance(unit.node, DEFINITIONS)
        if above and (isinstance(above.node, DEFINITIONS) or defines and not unit.lead):
            gap = blank
        elif above and (min(above.rank, unit.rank) < 2 or defines):
            gap = max(gap, 1) if above.rank else 1
        text += "\n" * gap if above else ""
        if unit.lead:
            text += unit.lead + "\n" * (blank + 1 if defines else 2)
        text += unit.text + "\n" + join(unit.members, 1)
        above = unit
    return text


# ---- Merging ----


def merge(old: Iterable[Unit], new: Iterable[Unit], cell: Cell) -> list[Unit]:
    """Replace what has the same name where it stands; put a new name beside its neighbour."""
    units, new, seen = list(old), list(new), set()
    for i, unit in enumerate(new):
        line, names = unit.node.lineno, set(unit.names)
        if not names:
            raise cell.error(line, "a reopened class takes only methods, fields and assignments")
        if names & seen:
            raise cell.error(line, f"{unit.names[0]} is defined twice in one cell")
        seen |= names
        same = [j for j, u in enumerate(units) if names & set(u.names)]
        if unit.reopens:
            target = units[same[0]] if same else None
            members = weave(target, unit, cell)
            units[same[0]] = replace(target, members=tuple(members))
        elif same:
            lost = {n for j in same for n in units[j].names} - names
            if lost:
                raise cell.error(line, f"{min(lost)} was assigned together with it: restate both")
            first = units[same[0]]
            units[same[0]] = replace(unit, lead=unit.lead or first.lead, gap=first.gap)
            units = [u for j, u in enumerate(units) if j not in same[1:]]
        else:
            at = place(units, new, i)
            units.insert(at, unit)
            if (
                at + 1 < len(units)
                and i + 1 < len(new)
                and set(units[at + 1].names) & {n for u in new[i + 1 :] for n in u.names}
            ):  # between its neighbours: it takes the gap there, and the one in the cell follows
                below = units[at + 1]
                units[at : at + 2] = [
                    replace(unit, gap=below.gap),
                    replace(below, gap=new[i + 1].gap),
                ]
    return sorted(units, key=lambda unit: unit.rank)


def place(units: list[Unit], new: list[Unit], i: int) -> int:
    """Where `new[i]` goes: before the next known name, else after the previous, else at the end."""
    known = {name: j for j, u in enumerate(units) if u.rank == 2 for name in u.names}
    following = [known[name] for u in new[i + 1 :] for name in u.names if name in known]
    if following:
        return following[0]
    if i and new[i - 1].names[0] in known:
        return known[new[i - 1].names[0]] + 1
    if new[i].node.col_offset and isinstance(new[i].node, ast.AnnAssign):  # beside other fields
        fields = [j for j, u in enumerate(units) if isinstance(u.node, ast.AnnAssign)]
        return fields[-1] + 1 if fields else len(units)
    return len(units)


def weave(old: Unit | None, new: Unit, cell: Cell) -> list[Unit]:
    """The members of the old class with those of the reopening, which gives nothing else."""
    line, name = new.node.lineno, new.names[0]
    if old is None:
        raise cell.error(line, f"class {name} is reopened, but there is none")
    if not old.members or not new.members:
        raise cell.error(line, f"{name} is reopened, but it is no class with a body: restate it")
    if len(new.node.bases) + len(new.node.keywords) > 1:
        raise cell.error(line, f"{name} keeps its bases when reopened: to change them, restate it")
    for node in ast.walk(new.node):
        if isinstance(node, ast.Name) and node.id == "super":
            raise cell.error(node.lineno, "super() would mean another class once it is merged")
    kept = [unit for unit in old.members if not isinstance(unit.node, ast.Pass)]
    return merge(kept, new.members, cell)


def without(units: Iterable[Unit], names: list[str]) -> tuple[list[Unit], set[str]]:
    """Units without some names and members, and those of the names that were not there."""
    left, missing = [], set(names)
    for unit in units:
        prefix = f"{unit.names[0]}." if unit.members else None
        inner = [n.removeprefix(prefix) for n in missing if prefix and n.startswith(prefix)]
        if set(unit.names) & missing and set(unit.names) <= set(names):
            missing -= set(unit.names)
            continue
        if inner:
            members, unknown = without(unit.members, inner)
            missing -= {prefix + n for n in inner if n not in unknown}
            unit = replace(unit, members=tuple(members))
            if not members:
                unit = replace(unit, text=unit.text + "\n    pass")
        left.append(unit)
    return left, missing


def bound_name(key: tuple[str, str, str]) -> str:
    """The name that an import binds."""
    source, name, alias = key
    return alias or (name if source else name.split(".")[0])


def add_import(module: Module, unit: Unit, path: str, cell: Cell) -> None:
    """Unite an import statement with the module's; one from the module itself is dropped."""
    node, source = unit.node, getattr(unit.node, "module", None) or ""
    if getattr(node, "level", 0) or node.names[0].name == "*":
        raise cell.error(node.lineno, "relative and star imports can't be exported")
    if source == dotted(path):
        return
    lines = unit.text.split("\n")
    if unit.lead or lines[0].startswith("#"):
        raise cell.error(node.lineno, "imports get sorted: put the comment beside, not above")
    for alias in node.names:
        key = source, alias.name, alias.asname or ""
        marks = (lines[alias.lineno - node.lineno], lines[0])  # no string, so # is a comment
        comment = next((line[line.index("#") :] for line in marks if "#" in line), "")
        for other in list(module.imports):
            two_submodules = not (source or other[0] or key[2] or other[2])
            if other != key and bound_name(other) == bound_name(key) and not two_submodules:
                del module.imports[other]
        module.imports[key] = comment or module.imports.get(key, "")


def natural(text: str) -> tuple:
    """Sorts a9 before a10, and without regard to case, as isort and ruff do."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(p) if p.isdigit() else p for p in parts], text


def member_order(name: str) -> tuple:
    """isort's order of imported names: constants, classes, the rest."""
    return 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, natural(name)


def render_imports(imports: dict[tuple[str, str, str], str]) -> str:
    """Import statements in the order and the layout of ruff's isort rule and formatter."""
    statements: dict[tuple, list[tuple]] = {}
    for (source, name, alias), comment in imports.items():
        root = (source or name).split(".")[0]
        kind = 1 if root in sys.stdlib_module_names else 3 if root == PACKAGE else 2
        kind = 0 if root == "__future__" else kind
        alone = (name, alias) if alias or not source else ("", "")  # a statement of its own
        shown = f"{name} as {alias}" if alias else name
        statement = statements.setdefault((kind, source, alone), [])
        statement.append((member_order(name), shown, comment))
    rows = []
    for (kind, source, alone), members in statements.items():
        members.sort()
        head = f"from {source} import " if source else "import "
        text = head + ", ".join(shown for _, shown, _ in members)
        wraps = len(text) > WIDTH or len(members) > 1 and any(c for *_, c in members)
        if source and wraps:
            inner = [f"    {shown},  {comment}".rstrip() for _, shown, comment in members]
            text = "\n".join([f"{head}(", *inner, ")"])
        else:
            text = f"{text}  {members[0][2]}".rstrip()
        rows.append((kind, bool(source), natural(source or alone[0]), members[0][0], alone, text))
    rows.sort()
    blocks = [[row[-1] for row in rows if row[0] == kind] for kind in range(4)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def render(module: Module, path: str) -> str:
    """The module's source."""
    body = [unit for unit in module.units if unit.names != ("__doc__",)]
    nodes = list(ast.walk(ast.parse(join(body, 2))))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Assign) and names_of(node) == ("__all__",):
            used |= {n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
    keep_all = path.endswith("__init__.py")
    imports = {
        key: comment
        for key, comment in module.imports.items()
        if keep_all or bound_name(key) in used or key[0] == "__future__" or "noqa: F401" in comment
    }
    docs = [unit.text for unit in module.units if unit.names == ("__doc__",)]
    head = "\n\n".join(part for part in [*docs, render_imports(imports)] if part)
    near = body and isinstance(body[0].node, DEFINITIONS) and not body[0].lead
    return (head + ("\n\n\n" if near else "\n\n" if body else "\n") if head else "") + join(body, 2)


def dotted(path: str) -> str:
    """nanovllm/engine/x.py → nanovllm.engine.x"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def texts(units: Iterable[Unit], prefix: str = "") -> dict[str, str]:
    """Name or Class.member → its text."""
    found = {}
    for unit in units:
        for name in unit.names if unit.names != ("__doc__",) else ():
            found[prefix + name] = unit.lead + unit.text
            found |= texts(unit.members, f"{prefix}{name}.")
    return found


class Package:
    """The package that some cells leave, and who wrote which name."""

    def __init__(self, cells: Iterable[Cell] = ()):
        self.modules: dict[str, Module] = {}
        self.owner: dict[tuple[str, str], str] = {}  # (path, name or Class.member) -> chapter
        self.last: dict[str, str] = {}  # path -> the last chapter that had to do with it
        self.count: Counter[tuple[str, str]] = Counter()
        for cell in cells:
            self.add(cell)

    def add(self, cell: Cell) -> None:
        """Merge a cell; one without a directive changes nothing."""
        directives = cell.directives()
        if not directives:
            return
        units = cell.units()
        for _, path, names, line in directives:
            if path:
                self.remove(path, names, cell, line)
        path = "".join(target for target, *_ in directives)
        if not path:
            if units:
                raise cell.error(units[0].node.lineno, "a cell that only deletes holds no code")
            return
        module = self.modules.setdefault(path, Module())
        imports = [unit for unit in units if isinstance(unit.node, IMPORTS)]
        for unit in imports:
            add_import(module, unit, path, cell)
        units = [unit for unit in units if unit not in imports]
        if imports and units:  # what stood above the first one was an import
            units[0] = replace(units[0], gap=min(units[0].gap, 1))
        module.units = merge(module.units, units, cell)
        bound = {name for unit in units for name in unit.names}
        module.imports = {k: v for k, v in module.imports.items() if bound_name(k) not in bound}
        reopened = {unit.names[0] for unit in units if unit.reopens}
        for name in bound - reopened:
            self.forget(path, name)
        for name in texts(units).keys() - reopened:
            self.owner[path, name] = cell.chapter
            self.count[path, name] += 1
        self.last[path] = cell.chapter

    def remove(self, path: str, names: list[str], cell: Cell, line: int) -> None:
        """Carry out a `delete` directive; a module that is empty afterwards goes."""
        module = self.modules.get(path)
        if module is None:
            raise cell.error(line, f"there is no {path} to delete from")
        module.units, missing = without(module.units, names)
        imported = {bound_name(key) for key in module.imports}
        if missing - imported:
            raise cell.error(line, f"there is no {min(missing - imported)} to delete")
        module.imports = {k: v for k, v in module.imports.items() if bound_name(k) not in missing}
        for name in names or [name for p, name in self.owner if p == path]:
            self.forget(path, name)
        kept = module.imports if path.endswith("__init__.py") else None  # there they are the point
        if not names or not kept and all(u.names == ("__doc__",) for u in module.units):
            del self.modules[path]
        self.last[path] = cell.chapter

    def forget(self, path: str, name: str) -> None:
        """Drop who wrote a name, and its members if it is a class."""
        for key in [k for k in self.owner if k[0] == path and f"{k[1]}.".startswith(f"{name}.")]:
            del self.owner[key]

    def sources(self) -> dict[str, str]:
        """Path -> source of every module."""
        return {path: render(module, path) for path, module in sorted(self.modules.items())}


# ---- Chapters and stages ----


def chapters(directory: Path = HERE) -> list[Path]:
    """The chapters' notebooks, in order."""
    paths = sorted(Path(directory).glob("[0-9][0-9]_*.ipynb"))
    for above, below in zip(paths, paths[1:], strict=False):
        if above.name[:2] == below.name[:2]:
            raise TangleError(f"{above.name} and {below.name} have the same number")
    return paths


def cells(chapter: Path) -> list[Cell]:
    """The code cells of a chapter."""
    try:
        numbered = enumerate(json.loads(chapter.read_text(encoding="utf-8"))["cells"], start=1)
    except (ValueError, KeyError, TypeError) as error:
        raise TangleError(f"{chapter.name} is not a notebook: {error}") from None
    code = [(n, "".join(c["source"])) for n, c in numbered if c["cell_type"] == "code"]
    return [Cell(source, chapter.name, n) for n, source in code]


def package(k: int, directory: Path = HERE) -> Package:
    """The package as of chapter k."""
    return Package(cell for chapter in chapters(directory)[:k] for cell in cells(chapter))


def stage(k: int, directory: Path = HERE) -> dict[str, str]:
    """Path -> source of the package as of chapter k."""
    return package(k, directory).sources()


def on_disk(root: Path) -> dict[str, str]:
    """Path -> source of the package in a folder."""
    files = Path(root, PACKAGE).rglob("*.py")
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in files}


def write(sources: dict[str, str], out: Path) -> list[str]:
    """Make the package under `out` equal to `sources`; returns the paths that changed."""
    old = on_disk(out)
    changed = [p for p in sorted({*old, *sources}) if old.get(p) != sources.get(p)]
    for path in changed:
        file = Path(out, path)
        # Python would trust bytecode of the same second and size, also in a child process.
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
        if path in sources:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(sources[path], encoding="utf-8", newline="\n")
        else:
            file.unlink()
    return changed


def write_stage(k: int, out: Path, directory: Path = HERE) -> list[str]:
    """Write the package as of chapter k to a folder, its data files linked beside the code."""
    return write_with_data(stage(k, directory), Path(out), directory)


def write_with_data(sources: dict[str, str], out: Path, directory: Path) -> list[str]:
    """Write a package that is importable: with an `__init__.py`, and the data of the real one."""
    # Without an `__init__.py` an installed package of the same name would shine through.
    changed = write({f"{PACKAGE}/__init__.py": "", **sources}, out)
    root = Path(directory).resolve().parent
    for data in Path(root, PACKAGE).rglob("*"):
        if not data.is_file() or data.suffix in (".py", ".pyc"):
            continue
        # Files, not folders: code written through a linked folder would land in the repository.
        link = Path(out, data.relative_to(root))
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.exists():
            continue
        link.unlink(missing_ok=True)  # it may point to what is gone
        try:
            link.symlink_to(data)
        except OSError:
            shutil.copy(data, link)
    return changed


# ---- In a notebook ----


@dataclass
class Session:
    """One notebook's scratch copy of the package, and the export cells that it has run."""

    chapter: int
    scratch: Path
    cells: list[Cell]  # of the chapters before, as they were at the start
    before: dict[str, str]
    now: dict[str, str]
    executed: dict[str, Cell] = field(default_factory=dict)  # cell id -> cell, last run last
    homes: dict[str, str] = field(default_factory=dict)  # name that an export cell bound -> path


_session: Session | None = None


def _shell():
    """The running IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        raise TangleError("this works in a notebook (or IPython) only: it follows executed cells")
    return shell


def start(chapter: int) -> None:
    """Open a chapter: import the package as the chapters before left it, and say where we run."""
    global _session
    import torch

    shell, gpu = _shell(), torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    before = [c for p in chapters()[: chapter - 1] for c in cells(p)]
    sources = Package(before).sources()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if _session:
        old = str(_session.scratch)
        sys.path[:], paths = [p for p in sys.path if p != old], [p for p in paths if p != old]
        shell.events.unregister("post_run_cell", _record)
    scratch = Path(tempfile.mkdtemp(prefix="nanovllm-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _session = Session(chapter, scratch, before, sources, sources)
    sys.path.insert(0, str(scratch))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(scratch), *paths])  # for child processes
    write_with_data(sources, scratch, HERE)
    _renew()
    shell.events.register("post_run_cell", _record)
    device = torch.cuda.get_device_name() if gpu else f"cpu, threads: {torch.get_num_threads()}"
    print(f"package: as chapter {chapter - 1} leaves it" if chapter > 1 else "package: empty yet")
    print(f"device:  {device}")
    print(f"python {platform.python_version()}, torch {torch.__version__}", end="")
    print(f", triton {version('triton')}" if sys.platform == "linux" else "")


def _record(result) -> None:
    """Remember an export cell that ran well; a cell that ran before counts in its new form."""
    source = result.info.raw_cell or ""
    if not (source.startswith("#|") or MARK.search(source)) or _session is None:
        return
    cell = Cell(source, "this notebook, as executed", result.execution_count or 0)
    try:
        target = "".join(target for target, *_ in cell.directives())
        bound = {name for node in cell.body() for name in names_of(node)}
        if target and result.error_before_exec is None:
            _session.homes |= dict.fromkeys(bound, target)  # a cell that fails half-way binds too
        cell.units()
    except TangleError as error:
        if result.success:
            print(f"tangle: this cell is left out: {error}", file=sys.stderr)
        return
    if result.success:
        key = getattr(result.info, "cell_id", None) or source
        _session.executed.pop(key, None)
        _session.executed[key] = cell


def checkpoint() -> None:
    """From here on `nanovllm` is the package with this chapter's executed cells in it."""
    if _session is None:
        raise TangleError("no chapter is open: call tangle.start(k) first")
    _session.now = Package([*_session.cells, *_session.executed.values()]).sources()
    changed = write_with_data(_session.now, _session.scratch, HERE)
    _renew()
    names = ", ".join(path.removeprefix(PACKAGE + "/") for path in changed)
    print(f"nanovllm is up to date{': ' + names if changed else ''}")


def _home(name: str, value: object) -> tuple[str, str] | None:
    """Where a name of the notebook comes from: a module of the package, and the name in it."""
    if isinstance(value, ModuleType):
        module, inside = value.__name__, ""
    else:  # an instance has no __qualname__, and stays what it is
        module, inside = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
    if isinstance(module, str) and module.split(".")[0] == PACKAGE and isinstance(inside, str):
        if (inside or isinstance(value, ModuleType)) and "<locals>" not in inside:
            return module, inside
    return (dotted(_session.homes[name]), name) if name in _session.homes else None


def _renew() -> None:
    """Import the package afresh, and point the notebook's names at what is in it."""
    loaded = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    for name in loaded:
        del sys.modules[name]
    importlib.invalidate_caches()
    linecache.checkcache()
    namespace = _shell().user_ns
    # `_` and `_12` are the notebook's own memory of what cells displayed.
    mine = [(n, v) for n, v in namespace.items() if n.strip("_0123456789")]
    homes = {name: home for name, value in mine if (home := _home(name, value))}
    fresh = {}
    for module in {PACKAGE, *loaded, *(module for module, _ in homes.values())}:
        try:
            fresh[module] = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # something that it imports
                raise
    ran = {name for c in _session.executed.values() for u in c.units() for name in u.names}
    for name, (module, inside) in homes.items():
        try:
            namespace[name] = attrgetter(inside)(fresh[module]) if inside else fresh[module]
        except (KeyError, AttributeError):  # deleted; or of a cell that failed, and then it stays
            if name in ran or name not in _session.homes:
                del namespace[name]


def changes() -> None:
    """Close a chapter: the package's files with what is new in them, and the diff, folded."""
    from IPython.display import display

    tree, folds = [], []
    for path in sorted({*_session.before, *_session.now}):
        diff = list(_diff(path, _session.before, _session.now))
        added = sum(line.startswith("+") for line in diff[2:])
        removed = sum(line.startswith("-") for line in diff[2:])
        note = f"+{added} -{removed}" if diff else "as it was"
        tree.append(f"{path:40} {note}")
        if diff:
            code = html.escape("".join(diff))
            folds.append(f"<details><summary>{path} ({note})</summary><pre>{code}</pre></details>")
    text = "\n".join(tree)
    display({"text/html": f"<pre>{text}</pre>" + "".join(folds), "text/plain": text}, raw=True)


def _diff(path: str, old: dict[str, str], new: dict[str, str]):
    before, after = (s.get(path, "").splitlines(keepends=True) for s in (old, new))
    return difflib.unified_diff(before, after, f"{path} before", path)


# ---- From a shell ----


def check(directory: Path) -> str:
    """What differs between the package on disk and the chapters; empty where nothing does."""
    built, disk = package(10**6, directory), on_disk(directory.parent)
    sources, report = built.sources(), ""
    for path in sorted({*sources, *disk}):
        diff = "".join(_diff(path, disk, sources))
        if diff or (path in sources) != (path in disk):
            there, here = pieces(disk.get(path, "")), pieces(sources.get(path, ""))
            names = {name for name in {*there, *here} if there.get(name) != here.get(name)}
            owners = {built.owner[path, n] for n in names if (path, n) in built.owner}
            who = sorted(owners) or [built.last.get(path, "the chapters")]
            report += f"{path} is not what {', '.join(who)} export:\n{diff}"
    return report


def pieces(source: str) -> dict[str, str]:
    """Name or Class.member -> its text, for a source file."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    lines = source.split("\n")
    units = split(lines, body, 0, len(lines))
    return texts(unit for unit in units if not isinstance(unit.node, IMPORTS))


def impact(k: int, directory: Path) -> str:
    """For each later stage, which names of chapter k still stand in it and which are replaced."""
    names, report = chapters(directory), ""
    mine = {key for key, owner in package(k, directory).owner.items() if owner == names[k - 1].name}
    for later in range(k + 1, len(names) + 1):
        owner = package(later, directory).owner
        gone = {
            key: owner.get(key, "") for key in sorted(mine) if owner.get(key) != names[k - 1].name
        }
        report += f"stage {later}: {len(mine) - len(gone)} names of chapter {k} stand in it"
        told = [
            f"{path}::{name} " + (f"(chapter {int(who[:2])})" if who else "(deleted)")
            for (path, name), who in gone.items()
        ]
        woven = {
            (path, name.split(".")[0])
            for (path, name), who in owner.items()
            if "." in name and who > names[k - 1].name
        }
        told += [f"{path}::{name} (reopened)" for path, name in sorted(woven & mine - {*gone})]
        report += f"; replaced: {', '.join(told)}\n" if told else "\n"
    return report or f"no stage after chapter {k}\n"


def main() -> int:
    """The command line; 0 well, 1 a check that failed, 2 chapters that can't be merged."""
    parser = argparse.ArgumentParser(description="Write nanovllm/ out of the chapters.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--upto", type=int, metavar="K", help="write the package as of chapter K")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --upto writes")
    parser.add_argument(
        "--impact", type=int, metavar="K", help="which later stages chapter K reaches"
    )
    parser.add_argument("--count", action="store_true", help="how often each name is defined")
    args = parser.parse_args()
    if (args.upto is None) != (args.out is None):
        parser.error("--upto and --out go together")
    try:
        last = len(chapters())
        for k in (args.upto, args.impact):
            if k is not None and not 0 < k <= last:
                parser.error(f"there is no chapter {k}: the book has {last}")
        if args.upto:
            write_stage(args.upto, args.out)
        elif args.impact:
            print(impact(args.impact, HERE), end="")
        elif args.count:
            most = package(10**6).count.most_common(20)
            print("\n".join(f"{n:3} {path}::{name}" for (path, name), n in most if n > 1))
            return int(any(n > MOST_DEFINITIONS for _, n in most))
        elif args.check:
            report = check(HERE)
            print(report, end="")
            return int(bool(report))
        elif not last:  # writing would remove the whole package
            raise TangleError(f"there are no chapters in {HERE.name}/")
        else:
            print("\n".join(write(stage(10**6), HERE.parent)) or "nothing to change")
        return 0
    except TangleError as error:
        print(f"tangle: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

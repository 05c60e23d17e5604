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
import json
import linecache
import os
import platform
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE, WIDTH, MOST_DEFINITIONS = "nanovllm", 100, 3
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DIRECTIVE = re.compile(r"#\|\s*(export|delete):\s*(nanovllm/[\w/]*\w\.py)(?:::([\w., ]+))?\s*$")
GUARD = "if __name__ == '__main__'"


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


@dataclass(frozen=True)
class Unit:
    """What one name stands for: its source as written, with the comments above it."""

    name: str
    text: str
    gap: int  # blank lines above, as written
    node: ast.stmt
    line: int  # in its cell


@dataclass
class Module:
    """A module of the package while it is being merged."""

    imports: dict[tuple[str, str, str], str] = field(default_factory=dict)  # value: a noqa comment
    units: list[Unit] = field(default_factory=list)


# ---- Source text <-> units ----


def name_of(node: ast.stmt, first: bool) -> str:
    """The name that a statement defines; empty for a statement that may not be exported."""
    if isinstance(node, DEFINITIONS):
        return node.name
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [t for target in targets for t in getattr(target, "elts", [target])]
        return ",".join(n.id for n in names) if all(isinstance(n, ast.Name) for n in names) else ""
    if type(node).__name__ == "TypeAlias":
        return node.name.id
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "__doc__" if first and isinstance(node.value.value, str) else ""
    header = ast.unparse(node).split(":\n")[0] if isinstance(node, ast.If) else ""
    return header if header in (GUARD, "if TYPE_CHECKING") else ""


def split(lines: list[str], body: list[ast.stmt], start: int, shift: int = 0) -> list[Unit]:
    """Cut `lines[start:]`, whose statements are `body`, into units; no comment gets lost."""
    units: list[Unit] = []
    for node in body:
        above = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1
        lead = lines[start:above]
        gap = next((i for i, line in enumerate(lead) if line.strip()), len(lead))
        text = "\n".join([*lead[gap:], *lines[above : node.end_lineno]])
        name = name_of(node, first=not units)
        setter = any(
            ast.unparse(d).startswith(f"{name}.") for d in getattr(node, "decorator_list", [])
        )
        if units and setter and units[-1].name == name:
            units[-1] = replace(units[-1], text=units[-1].text + "\n\n" + text)
        else:
            units.append(Unit(name, text, gap, node, node.lineno + shift))
        start = node.end_lineno
    rest = "\n".join(lines[start:]).rstrip()
    if rest and units:
        units[-1] = replace(units[-1], text=units[-1].text + "\n" + rest)
    return units


def join(units: list[Unit], blank: int) -> str:
    """The text of units; `blank` lines stand around every function and class."""
    text = ""
    for above, unit in zip([None, *units], units, strict=False):
        gap = min(unit.gap, blank)
        if above and (isinstance(above.node, DEFINITIONS) or isinstance(unit.node, DEFINITIONS)):
            gap = blank
        elif above and above.name == "__doc__":
            gap = 1
        if above and above.name == "__doc__" and blank == 1:
            gap = 1
        text += ("\n" * gap if above else "") + unit.text + "\n"
    return text


def open_class(unit: Unit) -> tuple[str, list[Unit]]:
    """A class as its header and its members; `pass` and `...` are no members."""
    lines, node = unit.text.split("\n"), ast.parse(unit.text).body[0]
    before = max([node.lineno, *(n.end_lineno for n in [*node.bases, *node.keywords])])
    start = (
        next(
            i for i in range(before - 1, len(lines)) if lines[i].split("#")[0].rstrip()[-1:] == ":"
        )
        + 1
    )
    body = [n for n in node.body if not isinstance(n, ast.Pass) and ast.unparse(n) != "..."]
    shift = unit.line - node.lineno
    return "\n".join(lines[:start]), split(lines, body, start, shift) if body else []


# ---- Merging ----


def merge(old: list[Unit], new: list[Unit], cell: Cell) -> list[Unit]:
    """Replace what has the same name where it stands; put a new name beside its neighbour."""
    units, had = list(old), {unit.name for unit in old}
    for i, unit in enumerate(new):
        if not unit.name:
            raise cell.error(
                unit.line, "only imports, functions, classes and assignments are exported"
            )
        names = [u.name for u in units]
        if unit.name in names:
            at = names.index(unit.name)
            units[at] = weave(units[at], unit, cell) if reopens(unit) else unit
            continue
        if reopens(unit):
            raise cell.error(unit.line, f"class {unit.name} is reopened, but there is none")
        following = next((n.name for n in new[i + 1 :] if n.name in had), None)
        if unit.name == "__doc__":
            at = 0
        elif following in names:
            at = names.index(following)
        elif i and new[i - 1].name in names and new[i - 1].name != "__doc__":
            at = names.index(new[i - 1].name) + 1
        else:
            fields = [j for j, u in enumerate(units) if isinstance(u.node, ast.AnnAssign)]
            in_class = unit.text.startswith(" ")
            is_field = isinstance(unit.node, ast.AnnAssign) and in_class and fields
            at = fields[-1] + 1 if is_field else len(units) - (names[-1:] == [GUARD])
        units.insert(at, unit)
    return units


def reopens(unit: Unit) -> bool:
    """Is it `class X(X):`?"""
    bases = getattr(unit.node, "bases", [])
    return len(bases) == 1 and isinstance(bases[0], ast.Name) and bases[0].id == unit.name


def weave(old: Unit, new: Unit, cell: Cell) -> Unit:
    """The old class with the members of the reopening in it."""
    if not isinstance(old.node, ast.ClassDef):
        raise cell.error(new.line, f"{new.name} is reopened, but it is no class")
    for node in ast.walk(new.node):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "super":
            raise cell.error(node.lineno, "super() would mean another class once it is merged")
    header, members = open_class(old)
    body = join(merge(members, open_class(new)[1], cell), 1)
    return replace(old, text=f"{header}\n{body}".rstrip("\n"))


def delete(module: Module, name: str, cell: Cell) -> None:
    """Take a name, or a member of a class, out of a module."""
    top, _, member = name.partition(".")
    at = next((i for i, unit in enumerate(module.units) if unit.name == top), None)
    if at is None:
        raise cell.error(1, f"there is no {name} to delete")
    if not member:
        del module.units[at]
        return
    header, members = open_class(module.units[at])
    left = [unit for unit in members if unit.name != member]
    if len(left) == len(members):
        raise cell.error(1, f"there is no {name} to delete")
    body = join(left, 1) if left else "    pass"
    module.units[at] = replace(module.units[at], text=f"{header}\n{body}".rstrip("\n"))


def add_import(module: Module, unit_text: str, node: ast.stmt, path: str, cell: Cell) -> None:
    """Unite an import statement with the module's; one from the module itself is dropped."""
    source = getattr(node, "module", None) or ""
    if getattr(node, "level", 0) or node.names[0].name == "*":
        raise cell.error(node.lineno, "relative and star imports can't be exported")
    if source == path.removesuffix(".py").replace("/", "."):
        return
    comment = "  # noqa: F401" if "noqa: F401" in unit_text else ""
    for alias in node.names:
        module.imports[source, alias.name, alias.asname or ""] = comment


def render(module: Module, path: str) -> str:
    """The module's source."""
    body = "\n".join(unit.text for unit in module.units if unit.name != "__doc__")
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    groups: dict[int, dict[tuple, list[tuple]]] = {}
    for (source, name, alias), comment in module.imports.items():
        root = (source or name).split(".")[0]
        bound = alias or (name if source else root)
        if not (bound in used or comment or root == "__future__" or path.endswith("__init__.py")):
            continue
        kind = 1 if root in sys.stdlib_module_names else 3 if root == PACKAGE else 2
        kind = 0 if root == "__future__" else kind
        order = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
        key = (bool(source), (source or name).lower(), source or name, "" if source else alias)
        groups.setdefault(kind, {}).setdefault(key, []).append(
            (order, name.lower(), name, alias, comment)
        )
    blocks = []
    for _, statements in sorted(groups.items()):
        lines = []
        for (is_from, _, source, _), members in sorted(statements.items()):
            shown = [n + (f" as {a}" if a else "") for _, _, n, a, _ in sorted(members)]
            text = f"from {source} import {', '.join(shown)}" if is_from else f"import {shown[0]}"
            if len(text) > WIDTH:
                text = f"from {source} import (\n    " + ",\n    ".join(shown) + ",\n)"
            lines.append(text + max(m[-1] for m in members))
        blocks.append("\n".join(lines))
    docs = [unit.text for unit in module.units if unit.name == "__doc__"]
    units = [unit for unit in module.units if unit.name != "__doc__"]
    head = "\n\n".join([*docs, *blocks])
    gap = "\n\n\n" if units and isinstance(units[0].node, DEFINITIONS) else "\n\n"
    return head + (gap if head and units else "" if units else "\n") + join(units, 2)


class Package:
    """The package as some chapters leave it, and who wrote which name."""

    def __init__(self):
        self.modules: dict[str, Module] = {}
        self.owner: dict[tuple[str, str], str] = {}  # (path, name or Class.member) -> chapter
        self.count: Counter[tuple[str, str]] = Counter()

    def add(self, cell: Cell) -> None:
        """Merge a cell; one without a directive changes nothing."""
        target, lines = None, cell.source.split("\n")
        for i, line in enumerate(lines):
            if not line.startswith("#|"):
                break
            match = DIRECTIVE.match(line)
            if not match or (match[1] == "export" and (target or match[3])):
                raise cell.error(i + 1, f"not a directive: {line}")
            if match[1] == "export":
                target = match[2]
            else:
                self.remove(match[2], match[3], cell)
        else:
            i = len(lines)
        if i == 0:
            return
        try:
            body = ast.parse(cell.source).body
        except SyntaxError as error:
            raise cell.error(error.lineno or 1, f"does not parse: {error.msg}") from None
        if target is None:
            if body:
                raise cell.error(body[0].lineno, "a cell that only deletes holds no code")
            return
        imports = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        module = self.modules.setdefault(target, Module())
        for node in imports:
            add_import(
                module, "\n".join(lines[node.lineno - 1 : node.end_lineno]), node, target, cell
            )
            # An import is rendered at the top: where it stood there is an empty line.
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        units = split(lines, [n for n in body if n not in imports], i)
        if imports and units:  # what stood above the first one was an import
            units[0] = replace(units[0], gap=min(units[0].gap, 1))
        module.units = merge(module.units, units, cell)
        for unit in units:
            is_class = isinstance(unit.node, ast.ClassDef)
            members = open_class(unit)[1] if is_class else []
            names = [f"{unit.name}.{m.name}" for m in members if m.name != "__doc__"]
            for name in names + ([] if reopens(unit) or unit.name == "__doc__" else [unit.name]):
                self.owner[target, name] = cell.chapter
                self.count[target, name] += 1

    def remove(self, path: str, names: str | None, cell: Cell) -> None:
        """Carry out a `delete` directive; a module that is empty afterwards goes."""
        if path not in self.modules:
            raise cell.error(1, f"there is no {path} to delete from")
        if names is None:
            del self.modules[path]
            return
        for name in names.split(","):
            delete(self.modules[path], name.strip(), cell)
        if all(unit.name == "__doc__" for unit in self.modules[path].units):
            del self.modules[path]

    def sources(self) -> dict[str, str]:
        """Path -> source of every module."""
        return {path: render(module, path) for path, module in sorted(self.modules.items())}


# ---- Chapters and stages ----


def chapters(directory: Path = HERE) -> list[Path]:
    """The chapters' notebooks, in order."""
    return sorted(Path(directory).glob("[0-9][0-9]_*.ipynb"))


def cells(chapter: Path) -> list[Cell]:
    """The code cells of a chapter."""
    notebook = json.loads(chapter.read_text(encoding="utf-8"))
    numbered = enumerate(notebook["cells"], start=1)
    code = [(n, "".join(c["source"])) for n, c in numbered if c["cell_type"] == "code"]
    return [Cell(source, chapter.name, n) for n, source in code]


def package(k: int, directory: Path = HERE) -> Package:
    """The package as of chapter k."""
    result = Package()
    for chapter in chapters(directory)[:k]:
        for cell in cells(chapter):
            result.add(cell)
    return result


def stage(k: int, directory: Path = HERE) -> dict[str, str]:
    """Path -> source of the package as of chapter k."""
    return package(k, directory).sources()


def write(sources: dict[str, str], out: Path) -> list[str]:
    """Make the package under `out` equal to `sources`; returns the paths that changed."""
    changed = []
    for old in [p.relative_to(out).as_posix() for p in Path(out, PACKAGE).rglob("*.py")]:
        if old not in sources:
            Path(out, old).unlink()
            changed.append(old)
    for path, source in sources.items():
        file = Path(out, path)
        if not file.is_file() or file.read_text(encoding="utf-8") != source:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source, encoding="utf-8")
            changed.append(path)
    return changed


def write_stage(k: int, out: Path, directory: Path = HERE) -> list[str]:
    """Write the package as of chapter k to a folder, its data files linked beside the code."""
    return write_with_data(stage(k, directory), Path(out), directory)


def write_with_data(sources: dict[str, str], out: Path, directory: Path) -> list[str]:
    # An `__init__.py` there must be, or an installed package of the same name would shine through.
    changed = write({f"{PACKAGE}/__init__.py": "", **sources}, out)
    for data in Path(directory).parent.glob(f"{PACKAGE}/*/"):
        link = out / PACKAGE / data.name
        if link.exists() or any(data.rglob("*.py")) or data.name == "__pycache__":
            continue
        try:
            link.symlink_to(data.resolve(), target_is_directory=True)
        except OSError:
            shutil.copytree(data, link)
    return changed


# ---- In a notebook ----


@dataclass
class Session:
    """One notebook's scratch copy of the package, and the export cells that it has run."""

    chapter: int
    scratch: Path
    before: dict[str, str]
    now: dict[str, str] = field(default_factory=dict)
    executed: dict[str, str] = field(default_factory=dict)  # cell id -> source, last run last
    names: set[str] = field(default_factory=set)  # what export cells bound in the notebook


_session: Session | None = None


def start(chapter: int) -> None:
    """Open a chapter: import the package as the chapters before left it, and say where we run."""
    global _session
    import torch
    from IPython import get_ipython

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if _session:
        sys.path[:] = [path for path in sys.path if path != str(_session.scratch)]
        get_ipython().events.unregister("post_run_cell", _record)
    scratch = Path(tempfile.mkdtemp(prefix="nanovllm-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    _session = Session(chapter, scratch, before=stage(chapter - 1))
    _session.now = _session.before
    sys.path.insert(0, str(scratch))
    sys.dont_write_bytecode = True  # an edit within the same second must not meet its old bytecode
    paths = [str(scratch), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)[:])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    _renew(write_with_data(_session.before, scratch, HERE))
    get_ipython().events.register("post_run_cell", _record)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"cpu, threads: {torch.get_num_threads()}"
    print(f"package: as chapter {chapter - 1} leaves it" if chapter > 1 else "package: empty yet")
    print(f"device:  {device}")
    print(f"python {platform.python_version()}, torch {torch.__version__}", end="")
    print(f", triton {version('triton')}" if sys.platform == "linux" else "")


def _record(result) -> None:
    """Remember an export cell that ran well; a cell that ran before counts in its new form."""
    source = result.info.raw_cell or ""
    if not DIRECTIVE.match(source.split("\n")[0]) or _session is None:
        return
    if result.error_before_exec is None:
        _session.names.update(_top_names(source))  # a cell that failed half-way bound some too
    if result.success:
        key = getattr(result.info, "cell_id", None) or source
        _session.executed.pop(key, None)
        _session.executed[key] = source


def checkpoint() -> None:
    """From here on `nanovllm` is the package with this chapter's executed cells in it."""
    if _session is None:
        raise TangleError("no chapter is open: call tangle.start(k) first")
    merged = package(_session.chapter - 1)
    for number, source in enumerate(_session.executed.values(), start=1):
        merged.add(Cell(source, "this notebook, in the order of execution", number))
    _session.now = merged.sources()
    changed = write_with_data(_session.now, _session.scratch, HERE)
    _renew(changed, merged)
    names = ", ".join(path.removeprefix(PACKAGE + "/") for path in changed)
    print(f"nanovllm is up to date{': ' + names if changed else ''}")


def _renew(changed: list[str], merged: Package | None = None) -> None:
    """Import the package afresh, and point the notebook's names at what is in it."""
    from IPython import get_ipython

    for name in [n for n in sys.modules if n.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    importlib.invalidate_caches()
    linecache.checkcache()
    namespace = get_ipython().user_ns
    owner = merged.owner if merged else {}
    homes = {name: path.removesuffix(".py").replace("/", ".") for path, name in owner}
    ours = _session.names if _session else set()
    for name, value in list(namespace.items()):
        module = getattr(value, "__module__", None) or ""
        if isinstance(value, type(sys)) and value.__name__.split(".")[0] == PACKAGE:
            namespace[name] = importlib.import_module(value.__name__)
        elif (
            isinstance(module, str)
            and module.split(".")[0] == PACKAGE
            and hasattr(value, "__qualname__")
        ):
            _rebind(namespace, name, module, value.__qualname__)
        elif name in ours and name in homes:
            _rebind(namespace, name, homes[name], name)


def _top_names(source: str) -> list[str]:
    return [n for node in ast.parse(source).body for n in name_of(node, False).split(",") if n]


def _rebind(namespace: dict, name: str, module: str, attribute: str) -> None:
    """Point one name of the notebook at the fresh package; a name that is gone there goes here."""
    fresh = getattr(importlib.import_module(module.removesuffix(".__init__")), attribute, None)
    if fresh is None:
        del namespace[name]
    else:
        namespace[name] = fresh


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
    built = package(10**6, directory)
    sources, root = built.sources(), directory.parent
    paths = {p.relative_to(root).as_posix() for p in Path(root, PACKAGE).rglob("*.py")}
    disk = {path: Path(root, path).read_text(encoding="utf-8") for path in paths}
    report = ""
    for path in sorted({*sources, *disk}):
        diff = "".join(_diff(path, disk, sources))
        if diff:
            names = {
                n
                for p, n in built.owner
                if p == path and re.search(rf"\b{n.split('.')[-1]}\b", diff)
            }
            who = sorted({built.owner[path, n] for n in names})
            report += f"{path} is not what {', '.join(who) or 'the chapters'} export:\n{diff}"
    return report


def impact(k: int, directory: Path) -> str:
    """For each later stage, which names of chapter k still stand in it and which are replaced."""
    names, report = chapters(directory), ""
    mine = {key for key, owner in package(k, directory).owner.items() if owner == names[k - 1].name}
    for later in range(k + 1, len(names) + 1):
        owner = package(later, directory).owner
        gone = sorted(
            f"{path}::{name}" for path, name in mine if owner[path, name] != names[k - 1].name
        )
        report += f"stage {later}: {len(mine) - len(gone)} names of chapter {k} stand in it"
        report += f"; replaced: {', '.join(gone)}\n" if gone else "\n"
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
    for k in (args.upto, args.impact):
        if k is not None and not 0 < k <= len(chapters()):
            parser.error(f"there is no chapter {k}: the book has {len(chapters())}")
    if (args.upto is None) != (args.out is None):
        parser.error("--upto and --out go together")
    try:
        if args.upto:
            write_stage(args.upto, args.out)
        elif args.impact:
            print(impact(args.impact, HERE), end="")
        elif args.count:
            most = package(10**6).count.most_common(20)
            print("\n".join(f"{n:3} {path}::{name}" for (path, name), n in most if n > 1))
            return int(most[0][1] > MOST_DEFINITIONS)
        elif args.check:
            report = check(HERE)
            print(report, end="")
            return int(bool(report))
        else:
            print("\n".join(write(stage(10**6), HERE.parent)) or "nothing to change")
        return 0
    except TangleError as error:
        print(f"tangle: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

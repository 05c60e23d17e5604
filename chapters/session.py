"""A chapter in a running notebook: a scratch copy of the package that follows the executed cells.

Before a cell runs, `nanovllm` is brought up to date with the export cells that ran before, and
names that the cell uses and the notebook lacks are bound from it.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import html
import importlib
import linecache
import os
import platform
import re
import shutil
import symtable
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from cells import PACKAGE, Cell, TangleError, names_of
from merge import Package, dotted
from stages import INIT, code, package, unified_diff, write, write_stage


@dataclass
class Session:
    """One notebook's scratch copy of the package, and the export cells that it has run."""

    scratch: Path
    cells: list[Cell]  # of the chapters before, as they were at the start
    before: Package
    now: Package
    executed: dict[str, Cell] = field(default_factory=dict)  # cell id -> cell, last run last
    stale: bool = False  # a cell has run that is not in `now`
    changed: set[str] = field(default_factory=set)  # paths, since the last checkpoint
    # Name that an export cell or this module bound -> module, and the value that it had then.
    homes: dict[str, tuple[str, Any]] = field(default_factory=dict)
    complaint: str = ""  # why the package is not up to date, while nobody was told


_session: Session | None = None


# ---- What a notebook calls ----


def start(chapter: int) -> None:
    """Open a chapter: import the package as the chapters before left it, and say where we run."""
    global _session
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if _session is None:
        scratch = Path(tempfile.mkdtemp(prefix="nanovllm-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        sys.path.insert(0, str(scratch))
        paths = [str(scratch), os.environ.get("PYTHONPATH", "")]  # for child processes
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        _shell().events.register("pre_run_cell", _before_cell)
        _shell().events.register("post_run_cell", _after_cell)
    else:
        scratch = _session.scratch
    before = package(chapter - 1)
    _session = Session(scratch, code(chapter - 1), before, before)
    write_stage(chapter - 1, scratch)
    _point_to(_session, _renewed(_session, before, _forget()))
    device = torch.cuda.get_device_name() if gpu else f"cpu, threads: {torch.get_num_threads()}"
    leaves = f"as chapter {chapter - 1} leaves it" if before.modules else "empty yet"
    print(f"package: {leaves}\ndevice:  {device}")
    print(f"python {platform.python_version()}, torch {torch.__version__}", end="")
    print(f", triton {version('triton')}" if sys.platform == "linux" else "")


def checkpoint() -> None:
    """Bring `nanovllm` up to date now, and say which files changed since the last time."""
    session = _opened()
    _update(session)
    names = ", ".join(path.removeprefix(PACKAGE + "/") for path in sorted(session.changed))
    session.changed = set()
    print(f"nanovllm is up to date{': ' + names if names else ''}")


def changes() -> None:
    """Close a chapter: the package's files with what is new in them, and the diff, folded."""
    from IPython.display import display

    tree, folds = [], []
    before, now = _opened().before.sources(), _opened().now.sources()
    for path in sorted({*before, *now}):
        diff = list(unified_diff(path, before, now))
        added, removed = (sum(line[0] == sign for line in diff[2:]) for sign in "+-")
        mark = "+" if path not in before else "~" if diff else " "
        note = f"+{added} -{removed}" if diff else "as it was"
        tree.append(f"{mark} {path:40} {note}")
        if diff:
            text = html.escape("".join(diff))
            folds.append(f"<details><summary>{path} ({note})</summary><pre>{text}</pre></details>")
    text = "\n".join(tree)
    display({"text/html": f"<pre>{text}</pre>" + "".join(folds), "text/plain": text}, raw=True)


def verify(exercise: str, **answers: Any) -> None:
    """Check an exercise: the engine as the executed cells have it, or answers to its questions."""
    import exercises

    session = _opened()
    if session.stale:
        _update(session)
    try:
        print(f"{exercise}: {exercises.verify(exercise, **answers)}")
    except exercises.Wrong as error:
        print(f"{exercise}: not yet. {error}")


# ---- Around every cell ----


def _opened() -> Session:
    if _session is None:
        raise TangleError("no chapter is open: call tangle.start(k) first")
    return _session


def _shell() -> Any:
    """The running IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        raise TangleError("this works in a notebook (or IPython) only: it follows executed cells")
    return shell


def _before_cell(info: Any) -> None:
    """Give a cell the package, and the names from it, that it needs."""
    session, shell = _opened(), _shell()
    source = shell.transform_cell(info.raw_cell or "")
    missing = used_names(source) - {*shell.user_ns, *vars(builtins)}
    try:
        path, deletions = Cell(source, "", 0).directives()
    except TangleError:  # said once it has run
        return
    exports = bool(path or deletions)
    imports = re.search(rf"^\s*(from|import) {PACKAGE}\b", source, re.MULTILINE)
    session.complaint = ""
    try:
        # Between export cells the package may be half there: it is imported only if it has to be.
        if session.stale and (not exports or missing or imports):
            _update(session)
    except Exception as error:
        session.complaint = f"{_told(error)}; the notebook's names stay as they are"
    try:
        for name in sorted(missing):
            if module := _home(session, name, dotted(path) if exports else ""):
                shell.user_ns[name] = value = getattr(importlib.import_module(module), name)
                session.homes[name] = module, value
    except Exception as error:
        session.complaint = session.complaint or _told(error)
    if not exports:
        _complain(session)


def _after_cell(result: Any) -> None:
    """Remember an export cell that ran well; a cell that ran before counts in its new form."""
    session, source = _opened(), result.info.raw_cell or ""
    cell = Cell(source, "this notebook, as executed", result.execution_count or 0)
    if not result.success:
        _complain(session)
    try:
        path, deletions = cell.directives()
        if not path and not deletions:
            return
        namespace = _shell().user_ns
        bound = {name for node in ast.parse(source).body for name in names_of(node)}
        for name in bound & {*namespace}:  # a cell that fails half-way binds too
            session.homes[name] = dotted(path), namespace[name]
            session.stale = True
        cell.units()
    except (TangleError, SyntaxError) as error:
        if result.success:
            _say(f"this cell is left out: {error}")
        return
    if result.success:
        key = getattr(result.info, "cell_id", None) or source
        session.executed.pop(key, None)
        session.executed[key] = cell
        session.stale = True


def _complain(session: Session) -> None:
    """Say why the package is not up to date, once for a cell."""
    if session.complaint:
        _say(session.complaint)
    session.complaint = ""


def _say(text: str) -> None:
    print(f"tangle: {text}", file=sys.stderr, flush=True)  # ahead of what the cell itself prints


def _told(error: Exception) -> str:
    """An error in one line, with the line of the package where it arose, if it did there."""
    if isinstance(error, TangleError):
        return str(error)
    where, trace = "", error.__traceback__
    while trace:
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if file.startswith(str(_opened().scratch)):
            where = f"{Path(file).relative_to(_opened().scratch).as_posix()}, line {line}: "
        trace = trace.tb_next
    text = str(error).split("\n")[0].split(" (/")[0]  # an ImportError ends with the file's path
    return f"{PACKAGE} can't be imported yet: {where}{type(error).__name__}: {text}"


def used_names(source: str) -> set[str]:
    """The global names that code uses and does not bind; the class that it reopens is used too."""
    try:
        body, top = ast.parse(source).body, symtable.symtable(source, "cell", "exec")
    except SyntaxError:
        return set()
    tables = [top]
    for table in tables:
        tables += table.get_children()
    symbols = [symbol for table in tables for symbol in table.get_symbols()]
    used = {s.get_name() for s in symbols if s.is_referenced() and s.is_global()}
    used -= {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    return used | {node.name for node in classes for b in node.bases if ast.unparse(b) == node.name}


def _home(session: Session, name: str, target: str) -> str:
    """The module to take a name from: an export cell's own, else the one that defines it."""
    modules = {dotted(module.path): module for module in session.now.modules.values()}
    if name.startswith("__"):
        return ""
    if target:
        known = target in modules and hasattr(importlib.import_module(target), name)
        return target if known else ""
    modules.pop(f"{PACKAGE}.__main__", None)  # a program: nothing is taken from it
    found = [path for path, m in modules.items() if any(name in u.names for u in m.units)]
    if len(found) > 1:
        _say(f"{name} is in {' and in '.join(found)}: import one")
    return found[0] if len(found) == 1 else ""


# ---- Keeping up with the cells ----


def _update(session: Session) -> None:
    """Make `nanovllm` and the notebook's names those of the executed cells, or change nothing."""
    new = Package([*session.cells, *session.executed.values()])
    changed = write({**INIT, **new.sources()}, session.scratch)
    loaded = _forget()
    try:
        values = _renewed(session, new, loaded)
    except BaseException:
        write({**INIT, **session.now.sources()}, session.scratch)
        _forget()
        sys.modules.update(loaded)
        raise
    session.now, session.stale = new, False
    session.changed |= {*changed}
    _point_to(session, values)


def _forget() -> dict[str, ModuleType]:
    """Take the package's modules out of memory, for what is on disk; returns them."""
    ours = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    importlib.invalidate_caches()
    linecache.checkcache()
    return {name: sys.modules.pop(name) for name in ours}


_GONE = object()


def _renewed(session: Session, new: Package, loaded: dict[str, ModuleType]) -> dict[str, Any]:
    """Import what was loaded; returns what each of the notebook's names from it means by then."""
    files = [dotted(path) for path in {**INIT, **new.modules}]
    there = {file[: dot.start()] for file in files for dot in re.finditer(r"\.|$", file)}
    for module in sorted(there & {PACKAGE, *loaded}):
        importlib.import_module(module)
    values: dict[str, Any] = {}
    for name, value in list(_shell().user_ns.items()):
        module, names = _origin(value)
        home, known = session.homes.get(name, ("", None))
        if not name.strip("_0123456789"):  # `_12` is what a cell displayed
            continue
        if module:  # what was deleted goes
            values[name] = _resolve(module, names) if module in there else _GONE
        elif home in there and known is value:  # what was never exported stays
            found = _resolve(home, [name])
            values |= {name: found} if found is not _GONE else {}
    return values


def _resolve(module: str, names: list[str]) -> Any:
    """What a module has under a dotted name, or _GONE."""
    value: Any = importlib.import_module(module)
    for name in names:
        value = getattr(value, name, _GONE)
    return value


def _origin(value: object) -> tuple[str, list[str]]:
    """Where a value of the notebook comes from, as module and names, if that is the package."""
    if isinstance(value, ModuleType):
        module, name = value.__name__, ""
    else:  # an instance has no __qualname__, and stays what it is; so does what a function made
        module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "<")
    ours = re.fullmatch(rf"{PACKAGE}(\.\w+)*:[\w.]*", f"{module}:{name}")
    return (module, name.split(".") if name else []) if ours else ("", [])


def _point_to(session: Session, values: dict[str, Any]) -> None:
    """Give the notebook's names these values."""
    namespace = _shell().user_ns
    for name, value in values.items():
        if value is _GONE:
            del namespace[name]
            continue
        namespace[name] = value
        if name in session.homes:
            session.homes[name] = session.homes[name][0], value

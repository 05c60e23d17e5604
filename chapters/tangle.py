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
import pkgutil
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from types import ModuleType

from cells import PACKAGE, Cell, TangleError, names_of
from merge import Package, dotted

HERE = Path(__file__).resolve().parent
MOST_DEFINITIONS = 3
INIT = {f"{PACKAGE}/__init__.py": ""}  # without one, an installed package would shine through


# ---- Chapters and stages ----


def number(notebook: Path | str) -> int:
    """A chapter's number, from its file's name; 0 is an appendix that comes before chapter 1."""
    return int(Path(notebook).name[:2])


def last(directory: Path = HERE) -> int:
    """The number of the last chapter; 0 where there is none."""
    return max(map(number, chapters(directory)), default=0)


def chapters(directory: Path = HERE) -> list[Path]:
    """The chapters' notebooks, in order, an appendix 00 first."""
    paths = sorted(Path(directory).glob("[0-9][0-9]_*.ipynb"))
    for above, below in zip(paths, paths[1:]):
        if number(above) == number(below):
            raise TangleError(f"{above.name} and {below.name} have the same number")
    return paths


def code(k: int | None = None, directory: Path = HERE) -> list[Cell]:
    """The code cells of the chapters up to number k, or of all."""
    found = []
    for path in chapters(directory):
        if k is not None and number(path) > k:
            break
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except (ValueError, KeyError) as error:
            raise TangleError(f"{path.name} is not a notebook: {error}") from None
        for position, cell in enumerate(cells, start=1):
            if cell["cell_type"] == "code":
                found.append(Cell("".join(cell["source"]), path.name, position))
    return found


def package(k: int | None = None, directory: Path = HERE) -> Package:
    """The package as of chapter k, or the last."""
    return Package(code(k, directory))


def stage(k: int | None = None, directory: Path = HERE) -> dict[str, str]:
    """Path -> source of the package as of chapter k, or the last."""
    return package(k, directory).sources()


def on_disk(root: Path) -> dict[str, str]:
    """Path -> source of the package in a folder."""
    files = Path(root, PACKAGE).rglob("*.py")
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in files}


def write(sources: dict[str, str], out: Path) -> list[str]:
    """Make the package under `out` equal to `sources`; returns the paths that changed."""
    old = on_disk(out)
    changed = [path for path in sorted({*old, *sources}) if old.get(path) != sources.get(path)]
    for path in changed:
        file = Path(out, path)
        # Python would trust bytecode of the same second and size, also in a child process.
        Path(cache_from_source(str(file))).unlink(missing_ok=True)
        if path in sources:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(sources[path], encoding="utf-8", newline="\n")
        else:
            file.unlink()
    return changed


def write_stage(k: int, out: Path, directory: Path = HERE) -> list[str]:
    """Write the package as of chapter k to a folder, with the data files of the real one."""
    data = Path(directory).resolve().parent / PACKAGE
    for file in data.rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            copy = Path(out, PACKAGE, file.relative_to(data))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    return write({**INIT, **stage(k, directory)}, Path(out))


# ---- In a notebook ----


@dataclass
class Session:
    """One notebook's scratch copy of the package, and the export cells that it has run."""

    scratch: Path
    cells: list[Cell]  # of the chapters before, as they were at the start
    before: dict[str, str]
    now: dict[str, str]
    executed: dict[str, Cell] = field(default_factory=dict)  # cell id -> cell, last run last
    homes: dict[str, str] = field(default_factory=dict)  # name that an export cell bound -> module


_session: Session | None = None


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
        _shell().events.register("post_run_cell", _record)
    else:
        scratch = _session.scratch
    before = stage(chapter - 1)
    _session = Session(scratch, code(chapter - 1), before, before)
    write_stage(chapter - 1, scratch)
    _renew()
    device = torch.cuda.get_device_name() if gpu else f"cpu, threads: {torch.get_num_threads()}"
    print(f"package: as chapter {chapter - 1} leaves it" if before else "package: empty yet")
    print(f"device:  {device}")
    print(f"python {platform.python_version()}, torch {torch.__version__}", end="")
    print(f", triton {version('triton')}" if sys.platform == "linux" else "")


def _shell():
    """The running IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        raise TangleError("this works in a notebook (or IPython) only: it follows executed cells")
    return shell


def _record(result) -> None:
    """Remember an export cell that ran well; a cell that ran before counts in its new form."""
    source = result.info.raw_cell or ""
    cell = Cell(source, "this notebook, as executed", result.execution_count or 0)
    try:
        path, deletions = cell.directives()
        if not path and not deletions:
            return
        bound = {name for node in ast.parse(source).body for name in names_of(node)}
        _session.homes |= dict.fromkeys(bound, dotted(path))  # a cell that fails half-way binds too
        cell.units()
    except (TangleError, SyntaxError) as error:
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
    changed = write({**INIT, **_session.now}, _session.scratch)
    _renew()
    names = ", ".join(path.removeprefix(PACKAGE + "/") for path in changed)
    print(f"nanovllm is up to date{': ' + names if changed else ''}")


def _origin(value: object) -> str:
    """Where a value of the notebook comes from, as `module:name`, if that is the package."""
    if isinstance(value, ModuleType):
        origin, ours = value.__name__, rf"{PACKAGE}(\.\w+)*"
    else:  # an instance has no __qualname__, and stays what it is; so does what a function made
        origin = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
        ours = rf"{PACKAGE}(\.\w+)*:[\w.]+"
    return origin if re.fullmatch(ours, origin) else ""


def _renew() -> None:
    """Import the package afresh, and point the notebook's names at what is in it."""
    loaded = {name for name in sys.modules if name.split(".")[0] == PACKAGE}
    for name in loaded:
        del sys.modules[name]
    importlib.invalidate_caches()
    linecache.checkcache()
    for module in sorted({dotted(path) for path in {**INIT, **_session.now}} & {PACKAGE, *loaded}):
        importlib.import_module(module)
    namespace = _shell().user_ns
    for name, value in list(namespace.items()):
        origin = _origin(value)
        home = f"{_session.homes[name]}:{name}" if name in _session.homes else ""
        try:
            if (origin or home) and name.strip("_0123456789"):  # `_12` is what a cell displayed
                namespace[name] = pkgutil.resolve_name(origin or home)
        except (ModuleNotFoundError, AttributeError):
            if origin:  # it was deleted; what was never exported stays
                del namespace[name]


def changes() -> None:
    """Close a chapter: the package's files with what is new in them, and the diff, folded."""
    from IPython.display import display

    tree, folds = [], []
    for path in sorted({*_session.before, *_session.now}):
        diff = list(_diff(path, _session.before, _session.now))
        added, removed = (sum(line[0] == sign for line in diff[2:]) for sign in "+-")
        mark = "+" if path not in _session.before else "~" if diff else " "
        note = f"+{added} -{removed}" if diff else "as it was"
        tree.append(f"{mark} {path:40} {note}")
        if diff:
            text = html.escape("".join(diff))
            folds.append(f"<details><summary>{path} ({note})</summary><pre>{text}</pre></details>")
    text = "\n".join(tree)
    display({"text/html": f"<pre>{text}</pre>" + "".join(folds), "text/plain": text}, raw=True)


def _diff(path: str, old: dict[str, str], new: dict[str, str]):
    before, after = (s.get(path, "").splitlines(keepends=True) for s in (old, new))
    return difflib.unified_diff(before, after, f"{path} before", path)


# ---- From a shell ----


def check() -> str:
    """What differs between the package on disk and the chapters; empty where nothing does."""
    built, disk, report = package(), on_disk(HERE.parent), ""
    sources = built.sources()
    for path in sorted({*sources, *disk}):
        if sources.get(path) != disk.get(path):
            units = [unit for (where, _), unit in built.names().items() if where == path]
            news = {unit.chapter for unit in units if unit.text not in disk.get(path, "")}
            who = ", ".join(sorted(news or {u.chapter for u in units})) or "the chapters"
            diff = "".join(_diff(path, disk, sources))
            report += f"{path} is not what {who} export:\n{diff}"
    return report


def impact(k: int) -> str:
    """For each later stage, how many names of chapter k stand in it, and what became of others."""
    own = {number(path): path.name for path in chapters()}[k]
    mine, report = (
        sorted(key for key, unit in package(k).names().items() if unit.chapter == own),
        "",
    )
    for later in range(k + 1, last() + 1):
        there, told, stand = package(later).names(), [], 0
        for path, name in mine:
            unit = there.get((path, name))
            stand += unit is not None and unit.chapter == own
            if unit is None:
                told.append(f"{path}::{name} (deleted)")
            elif unit.chapter != own:
                told.append(f"{path}::{name} (chapter {number(unit.chapter)})")
            elif any(member.chapter != own for member in unit.members):
                told.append(f"{path}::{name} (reopened)")
        report += f"stage {later}: {stand} names of chapter {k} stand in it"
        report += f"; replaced: {', '.join(told)}\n" if told else "\n"
    return report or f"no stage after chapter {k}\n"


def main() -> int:
    """The command line; 0 well, 1 a check that failed, 2 chapters that can't be merged."""
    try:
        return run()
    except TangleError as error:
        print(f"tangle: {error}", file=sys.stderr)
        return 2


def run() -> int:
    """Do what the command line says; returns the exit status."""
    numbers = [number(path) for path in chapters()]
    k = {"type": int, "metavar": "K", "choices": numbers}
    parser = argparse.ArgumentParser(description="Write nanovllm/ out of the chapters.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--upto", **k, help="write the package as of chapter K")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --upto writes")
    parser.add_argument("--impact", **k, help="which later stages chapter K reaches")
    parser.add_argument("--count", action="store_true", help="how often each name is defined")
    args = parser.parse_args()
    if (args.upto is None) != (args.out is None):
        parser.error("--upto and --out go together")
    if not numbers:  # writing would remove the whole package
        parser.error(f"there are no chapters in {HERE.name}/")
    if args.upto is not None:
        write_stage(args.upto, args.out)
    elif args.impact is not None:
        print(impact(args.impact), end="")
    elif args.count:
        most = package().count.most_common(20)
        print("\n".join(f"{n:3} {path}::{name}" for (path, name), n in most if n > 1))
        return int(any(n > MOST_DEFINITIONS for _, n in most))
    elif args.check:
        report = check()
        print(report, end="")
        return int(bool(report))
    else:
        print("\n".join(write(stage(), HERE.parent)) or "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())

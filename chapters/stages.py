"""The notebooks of the chapters, and the package that they leave, chapter after chapter."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path

from cells import PACKAGE, Cell, TangleError
from merge import Package

HERE = Path(__file__).resolve().parent
INIT = {f"{PACKAGE}/__init__.py": ""}  # without one, an installed package would shine through


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


def unified_diff(path: str, old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    """The lines of a diff of one module."""
    before, after = (s.get(path, "").splitlines(keepends=True) for s in (old, new))
    return difflib.unified_diff(before, after, f"{path} before", path)

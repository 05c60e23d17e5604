"""Write the package out of the chapters, and run a chapter on the package that it edits.

A code cell whose first line is `#| export: nanovllm/…/x.py` belongs to that module, and one with
`#| delete: nanovllm/…/x.py::name, Class.member` removes names. Cells merge by name, in order.

In a notebook: `start(k)`, `changes()`, `verify(exercise)`, and `checkpoint()` for who wants to say
when.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cells import TangleError
from merge import Package
from session import changes, checkpoint, start, verify
from stages import (
    HERE,
    chapters,
    code,
    last,
    number,
    on_disk,
    package,
    stage,
    unified_diff,
    write,
    write_stage,
)

__all__ = [
    "Package",
    "TangleError",
    "changes",
    "chapters",
    "checkpoint",
    "code",
    "last",
    "number",
    "package",
    "stage",
    "start",
    "verify",
    "write_stage",
]
MOST_DEFINITIONS = 3


def check() -> str:
    """What differs between the package on disk and the chapters; empty where nothing does."""
    built, disk, report = package(), on_disk(HERE.parent), ""
    sources = built.sources()
    for path in sorted({*sources, *disk}):
        if sources.get(path) != disk.get(path):
            units = [unit for (where, _), unit in built.names().items() if where == path]
            news = {unit.chapter for unit in units if unit.text not in disk.get(path, "")}
            who = ", ".join(sorted(news or {u.chapter for u in units})) or "the chapters"
            diff = "".join(unified_diff(path, disk, sources))
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
    k: dict[str, Any] = {"type": int, "metavar": "K", "choices": numbers}
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

"""The plan of book/authors.md, as sketches through the tangle: no name is defined too often."""

from __future__ import annotations

import json
import re
from pathlib import Path

from test_tangle import export, write_book

import tangle

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book/authors.md").read_text(encoding="utf-8")
CELL = r" *([^|`]*?) *\|"
PLANNED = re.compile(rf"^\| (`.*`) \|{CELL}{CELL}{CELL} ", re.MULTILINE)


def titles() -> dict[str, int]:
    """The number of each chapter by its title."""
    found = {}
    for path in tangle.chapters():
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        found["".join(first).split("\n")[0].lstrip("# ")] = tangle.number(path)
    return found


def planned() -> dict[str, list[int]]:
    """Name -> the chapters that define it, as the page says."""
    number = titles()
    return {
        name: [number[title] for title in chapters if title]
        for names, *chapters in PLANNED.findall(PAGE)
        for name in re.findall(r"`([\w.]+)`", names)
    }


def sketch(name: str, chapter: int, path: str, is_there: bool) -> str:
    """An export cell that defines a name, in a class that it opens or reopens."""
    owner, _, member = name.partition(".")
    body = f"def {member or owner}(self):\n    return {chapter}"
    if member:
        base = f"({owner})" if is_there else ""
        body = f"class {owner}{base}:\n    " + body.replace("\n", "\n    ")
    return export(body, path)


def sketches(chapter: int, plan: dict[str, list[int]], seen: set[str]) -> list[str]:
    """Export cells that define what the plan gives to a chapter."""
    cells = []
    for name in (name for name, chapters in plan.items() if chapter in chapters):
        owner = name.partition(".")[0]
        cells.append(sketch(name, chapter, "nanovllm/m.py", owner in seen))
        seen.add(owner)
    return cells


def test_the_plan_goes_through_the_tangle_with_at_most_three_definitions(tmp_path):
    plan, seen, last = planned(), set(), tangle.last()
    assert {"LLMEngine.run_step", "Attention.forward", "ModelRunner.run"} <= plan.keys()
    book = write_book(tmp_path, *[sketches(k, plan, seen) for k in range(1, last + 1)])
    assert max(tangle.package(last, book).count.values()) <= tangle.MOST_DEFINITIONS
    for k in range(1, last + 1):
        scope: dict = {}
        exec(tangle.stage(k, book)["nanovllm/m.py"], scope)
        for name, chapters in plan.items():
            owner, _, member = name.partition(".")
            if chapters[0] <= k:
                found = getattr(scope[owner], member) if member else scope[owner]
                assert found(None) == max(c for c in chapters if c <= k), (name, k)


def test_the_chapters_so_far_follow_the_plan():
    package = tangle.package()
    for name, chapters in planned().items():
        counts = [n for (_, defined), n in package.count.items() if defined == name]
        assert sum(counts) == len(chapters), name

"""The plan of book/seams.md, as sketches through the tangle: no name is defined too often."""

import re
from pathlib import Path

from test_tangle import export, write_book

import tangle

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (`.*`) \| (\d) \| (\d?) ?\| (\d?) ?\|", re.MULTILINE)


def planned() -> dict[str, list[int]]:
    """Name -> the chapters that define it, as the page says."""
    table = ROW.findall((ROOT / "book/seams.md").read_text(encoding="utf-8"))
    return {
        name: [int(k) for k in chapters if k]
        for names, *chapters in table
        for name in re.findall(r"`([\w.]+)`", names)
    }


def sketch(chapter: int, plan: dict[str, list[int]], seen: set[str]) -> list[str]:
    """Export cells that define what the plan gives to a chapter."""
    cells = []
    for name in (name for name, chapters in plan.items() if chapter in chapters):
        owner, _, member = name.partition(".")
        body = f"def {member or owner}(self):\n    return {chapter}"
        if member:
            base = f"({owner})" if owner in seen else ""
            body = f"class {owner}{base}:\n    " + body.replace("\n", "\n    ")
            seen.add(owner)
        cells.append(export(body))
    return cells


def test_the_plan_goes_through_the_tangle_with_at_most_three_definitions(tmp_path):
    plan, seen = planned(), set()
    assert {"LLMEngine.run_step", "Attention.forward", "ModelRunner.run"} <= plan.keys()
    book = write_book(tmp_path, *[sketch(k, plan, seen) for k in range(1, 9)])
    assert max(tangle.package(8, book).count.values()) <= tangle.MOST_DEFINITIONS
    for k in range(1, 9):
        scope: dict = {}
        exec(tangle.stage(k, book)["nanovllm/m.py"], scope)
        for name, chapters in plan.items():
            owner, _, member = name.partition(".")
            if chapters[0] <= k:
                found = getattr(scope[owner], member) if member else scope[owner]
                assert found(None) == max(c for c in chapters if c <= k), (name, k)


def test_the_chapters_so_far_follow_the_plan():
    written = tangle.last()
    for name, chapters in planned().items():
        expected = sum(k <= written for k in chapters)
        owner = tangle.package(written).count
        counts = [n for (_, defined), n in owner.items() if defined == name]
        assert sum(counts) == expected, name

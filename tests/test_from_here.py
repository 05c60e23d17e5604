"""The map to other engines: no claim without a source, no link without a commit, no room without a
file of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BODY = (ROOT / "book/from_here.md").read_text("utf-8")
LINKS = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", BODY, re.M))
TEXT = re.sub(r"^\[[^\]]+\]: .*$", "", BODY, flags=re.M)
ROWS = [line for line in TEXT.splitlines() if re.match(r"\| (?!here |what )", line)]
SOURCE = re.compile(r"\]\((?:https:)|\]\[|\{cite")
PROJECTS = re.compile(r"vLLM|SGLang")
PINNED = re.compile(r"https://github.com/[\w-]+/[\w-]+/blob/[0-9a-f]{40}/\S+$")


def cells(row: str) -> list[str]:
    """A row's cells, the room of ours first."""
    return [cell.strip() for cell in row.strip("|").split(" | ")]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: cells(row)[0][:40])
def test_every_row_says_where_it_is_from(row):
    _, told = cells(row)
    parts = told.split("<br>")  # what they add, or the idea; vLLM's place; SGLang's place
    assert len(parts) == 3 and all(SOURCE.search(part) for part in parts), row
    assert sum(part.startswith(("**vLLM**: ", "**SGLang**: ")) for part in parts) == 2, row


def test_every_paragraph_about_another_engine_has_a_source():
    prose = [
        part for part in re.split(r"\n\n|\n(?=- |\d\. )", TEXT) if not part.startswith(("|", "#"))
    ]
    about = [
        part
        for part in prose[1:]
        if PROJECTS.search(part) and "Each link to a file is pinned" not in part
    ]
    assert about and [part for part in about if not SOURCE.search(part)] == []


def test_every_link_into_a_repository_is_pinned_and_used():
    used = set(re.findall(r"\]\[([^\]]+)\]", TEXT))
    assert used == set(LINKS)
    assert [url for url in LINKS.values() if not PINNED.match(url)] == []
    inline = re.findall(r"\]\((https://github.com/[^)]+)\)", TEXT)
    assert [url for url in inline if not re.search(r"/(?:pull|issues)/\d+$", url)] == []


def test_every_room_of_ours_exists():
    for row in ROWS:
        for part in cells(row)[0].replace("\\", "").replace("<wbr>", "").split("; "):
            files = re.findall(r"(?<![\w/(])([\w/]+\.py)", re.sub(r"\(.*?\)", "", part))
            code = "".join((ROOT / "nanovllm" / file).read_text("utf-8") for file in files)
            for name in re.findall(r"`([\w.]+)`", part):
                assert all(re.search(rf"\b{word}\b", code) for word in name.split(".")), name

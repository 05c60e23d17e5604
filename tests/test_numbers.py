"""Prose has no rate and no duration that nobody has measured: each is an output, or says whose.

A number with such a unit must be found, as it is rounded, among the outputs of its page, of a
chapter that its paragraph names, or of what a script has left in book/measure/. Or its paragraph,
or the one above it, says that it was measured apart, or cites where it is from.
"""

from __future__ import annotations

import json
import re
from functools import cache
from math import floor, log10
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:µs|us|ms|tokens/s|tokens a second|[GT]B/s|[TP]FLOP/s|pieces/s)"
MEASURED = re.compile(rf"({NUMBER})(?: (?:to|and) {NUMBER})? ?{UNIT}\b")
SAYS_WHOSE = re.compile(r"apart from this page|book/(?:tried|measured)|\(measured\.md\)|\{cite")
SCALES = 1, 1e-3, 1e3, 1e-6, 1e6  # an output may have another unit, or be a rate for a duration
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for place in ("chapters/*.ipynb", "book/*.ipynb", "book/*.md", "README.md")
    for path in ROOT.glob(place)
    if path.name not in ("tried.md", "measured.md")  # which say of each table where it is from
)


def numbers(text: str) -> set[float]:
    """All that a text says in digits."""
    return {float(found.replace(",", "")) for found in re.findall(rf"(?<![\w.]){NUMBER}", text)}


@cache
def of_scripts() -> set[float]:
    """What the files of book/measure/ have, and the page that says how it was measured."""
    files = [*ROOT.glob("book/measure/*.json*"), ROOT / "book/measured.md"]
    return set().union(*(numbers(path.read_text("utf-8")) for path in files))


def cells(page: str) -> list[dict]:
    """A notebook's cells; another page is a single one."""
    text = (ROOT / page).read_text("utf-8")
    if page.endswith(".md"):
        return [{"cell_type": "markdown", "source": text}]
    return json.loads(text)["cells"]


@cache
def outputs(page: str) -> set[float]:
    """The numbers in what the cells of a page have printed."""
    found = set()
    for cell in cells(page):
        for output in cell.get("outputs", ()):
            shown = output.get("text") or output.get("data", {}).get("text/plain", "")
            found |= numbers("".join(shown))
    return found


def is_found(told: str, known: set[float]) -> bool:
    """Is a number, as it is rounded, one of these?"""
    digits = told.replace(",", "")
    value, places = float(digits), len(digits.partition(".")[2])
    figures = len(digits.replace(".", "").strip("0")) or 1
    last = floor(log10(value or 1)) - figures + 1  # the place of its last figure that is no 0
    near = 0.505 * 10 ** max(last, -places)
    known = known | {1 / one for one in known if one}
    return any(abs(one * scale - value) <= near for one in known for scale in SCALES)


def unknown(page: str) -> list[str]:
    """The numbers of a page's prose that nothing has printed, with some words around them."""
    found, above = [], ""
    for cell in cells(page):
        if cell["cell_type"] != "markdown":
            continue
        for paragraph in "".join(cell["source"]).split("\n\n"):
            named = re.findall(r"chapters? (\d+)|(\d\d)_\w+\.ipynb", paragraph)
            known = outputs(page) | of_scripts()
            for number in {int(a or b) for a, b in named}:
                known |= set().union(*map(outputs, (p for p in PAGES if f"/{number:02}_" in p)))
            if not SAYS_WHOSE.search(paragraph) and not SAYS_WHOSE.search(above):
                found += [
                    paragraph[max(0, match.start() - 60) : match.end() + 20]
                    for match in MEASURED.finditer(paragraph)
                    if not is_found(match[1], known)
                ]
            above = paragraph
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_rate_and_duration_was_measured(page):
    assert unknown(page) == []


@pytest.mark.parametrize(
    ("told", "known", "is_right"),
    [
        ("27,500", {27459.2}, True),
        ("27,500", {27600.0}, False),
        ("1.3", {0.00131}, True),
        ("1.3", {0.00137}, False),
        ("17", {17.4, 99.0}, True),
        ("17", {18.0}, False),
        ("0.25", {253.0}, True),
    ],
)
def test_a_number_is_found_as_it_is_rounded(told, known, is_right):
    assert is_found(told, known) == is_right


def test_a_number_that_nothing_has_printed_is_told(monkeypatch):
    prose = (
        "It takes 3.17 ms.\n\nMeasured apart from this page:\n\n| 4.71 ms |\n\nIt takes 4.71 ms."
    )
    monkeypatch.setattr(
        f"{__name__}.cells",
        lambda page: [
            {"cell_type": "code", "outputs": [{"text": "3.171 ms"}]},
            {"cell_type": "markdown", "source": prose},
        ],
    )
    outputs.cache_clear()
    of_scripts.cache_clear()
    monkeypatch.setattr(f"{__name__}.of_scripts", lambda: set())
    assert unknown("a page") == ["It takes 4.71 ms."]
    outputs.cache_clear()

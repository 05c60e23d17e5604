"""A rate or a duration in prose is an output, or its paragraph says where it is from.

A number with such a unit must be found, as it is rounded, among the outputs of its page, of a
chapter that its paragraph names, or in what a script has left in book/measure/. Or its paragraph,
or the one above it, says that it was measured apart, or cites where it is from. This finds what an
output no longer says; a number of one or two figures it may find where it is not meant.
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
MEASURED = re.compile(rf"({NUMBER})(?: (?:to|and) ({NUMBER}))? ?({UNIT})\b")
SAYS_WHOSE = re.compile(r"apart from this page|book/(?:tried|measured)|\(measured\.md\)|\{cite")
SCALES = {  # what an output may be multiplied with to have another unit
    "tokens/s": (1,), "tokens a second": (1,), "pieces/s": (1,),
    "ms": (1, 1e3, 1e-3), "µs": (1, 1e3, 1e6), "us": (1, 1e3, 1e6),
}  # fmt: skip
PER_UNIT = {"ms": 1e3, "µs": 1e6, "us": 1e6}  # a duration may be one of a rate's
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


def is_found(told: str, known: set[float], unit: str) -> bool:
    """Is a number, as it is rounded, one of these?"""
    digits = told.replace(",", "")
    value, places = float(digits), len(digits.partition(".")[2])
    figures = len(digits.replace(".", "").strip("0")) or 1
    last = floor(log10(value or 1)) - figures + 1  # the place of its last figure that is no 0
    near = 0.505 * 10 ** max(last, -places)
    found = {one * scale for one in known for scale in SCALES.get(unit, (1, 1e-3, 1e3))}
    found |= {PER_UNIT[unit] / one for one in known if one and unit in PER_UNIT}
    return any(abs(one - value) <= near for one in found)


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
                    if not all(is_found(n, known, match[3]) for n in match.groups()[:2] if n)
                ]
            above = paragraph
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_rate_and_duration_was_measured(page):
    assert unknown(page) == []


@pytest.mark.parametrize(
    ("told", "unit", "known", "is_right"),
    [
        ("27,500", "tokens/s", {27459.2}, True),
        ("27,500", "tokens/s", {27600.0}, False),
        ("27.5", "tokens/s", {27500.0}, False),
        ("1.3", "ms", {0.00131}, True),
        ("1.3", "ms", {0.00137}, False),
        ("17", "TFLOP/s", {17.4, 99.0}, True),
        ("17", "TFLOP/s", {18.0}, False),
        ("0.25", "ms", {253.0}, True),
        ("0.73", "ms", {1372.6}, True),
    ],
)
def test_a_number_is_found_as_it_is_rounded(told, unit, known, is_right):
    assert is_found(told, known, unit) == is_right


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

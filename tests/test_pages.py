"""Every page of the built book, in a browser: it asks no other host, and all of it can be read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Tab
from pypdf import PdfReader

from stages import INIT, last, stage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import pdf  # noqa: E402

BUILT = ROOT / "_build" / "html"
SOURCES = sorted(path for name in ("book", "chapters") for path in (ROOT / name).glob("*.*"))
PAGES = [
    path.relative_to(ROOT).with_suffix("").as_posix()
    for path in SOURCES
    if path.suffix in (".md", ".ipynb")
]
# Pictures that could not be read, or have no words, and formulas that have not been set.
PICTURES = "[...document.images].filter((one) => one.complete && !one.naturalWidth)"
UNTOLD = "[...document.images].filter((one) => !one.alt || /[.](png|svg)$/.test(one.alt))"
WIDE = "[...document.querySelectorAll('.player')].filter((p) => p.scrollWidth > p.clientWidth)"
RAW_MATHS = (
    "[...document.querySelectorAll('.math')].filter((one) => !one.querySelector('mjx-container'))"
)


class Quiet(SimpleHTTPRequestHandler):
    """Sends files, and says nothing of it."""

    def log_message(self, *rest) -> None:
        pass


@pytest.fixture(scope="module")
def book() -> Iterator[str]:
    """The address of the book, which is built where it has not been."""
    if not (BUILT / "index.html").is_file():
        build = [str(Path(sys.executable).parent / "jupyter-book"), "build", ".", "-q"]
        subprocess.run(build, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(BUILT)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("size, theme", [("wide", "light"), ("phone", "dark")])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_by_itself(browser, book, page, size, theme):
    """No script error, no other host, no broken picture, no raw maths, nothing beside the page."""
    tab = Tab(browser, f"{book}/{page}.html", size, theme)
    try:
        if tab.see("document.querySelector('.math') !== null"):
            tab.wait("window.MathJax?.startup?.promise && true")
            tab.see("MathJax.startup.promise.then(() => true)")
        assert tab.faults(is_theirs=True) == []
        assert tab.see(f"{PICTURES}.map((one) => one.src)") == []
        assert tab.see(f"{UNTOLD}.map((one) => one.src)") == []
        assert tab.see(f"{RAW_MATHS}.map((one) => one.textContent)") == []
        assert tab.see("document.documentElement.scrollWidth - innerWidth") <= 0
        assert tab.see(f"{WIDE}.length") == 0
    finally:
        tab.close()


def test_a_recording_is_paged_through_by_its_buttons_and_its_slider(browser, book):
    tab = Tab(browser, f"{book}/book/life_of_a_request.html", "wide", "light")
    title = "document.querySelector('.player .frame:not([hidden]) p').textContent"
    try:
        assert tab.see("document.querySelectorAll('.player .frame:not([hidden])').length") == 1
        assert tab.see(title).startswith("step 4 of ")
        tab.see("document.querySelector('.player button:last-of-type').click()")
        assert tab.see(title).startswith("step 5 of ")
        move = "const one = document.querySelector('.player input'); one.value = 0;"
        tab.see(f"(() => {{ {move} one.dispatchEvent(new Event('input')); }})()")
        assert tab.see(title).startswith("step 1 of ")
        tab.see("document.querySelector('.player button').click()")  # there is none before
        assert tab.see(title).startswith("step 1 of ")
        assert tab.faults(is_theirs=True) == []
    finally:
        tab.close()


@pytest.mark.parametrize("by", ["tap", "key"])
def test_on_a_phone_a_picture_is_shown_as_large_as_it_is_and_closes_again(browser, book, by):
    tab = Tab(browser, f"{book}/chapters/03_paged_blocks.html", "phone", "dark")
    first, whole = "document.querySelector('img.small')", "document.querySelector('dialog.whole')"
    enter = "dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter' }))"
    try:
        tab.wait(f"{first} !== null")
        assert tab.see(f"{whole}.open") is False
        assert tab.see(f"{first}.clientWidth") < 390
        tab.see(f"{first}.{'click()' if by == 'tap' else enter}")
        tab.wait(f"{whole}.open && {whole}.querySelector('img').complete")
        sizes = [f"{whole}.querySelector('img').clientWidth", f"{first}.naturalWidth"]
        assert tab.see(sizes[0]) == tab.see(sizes[1]) > 390
        assert tab.see(f"{whole}.querySelector('img').alt") == tab.see(f"{first}.alt") != ""
        assert tab.see(f"{whole}.getBoundingClientRect().width") <= 390
        tab.see(f"{whole}.click()")
        assert tab.see(f"{whole}.open") is False
        assert tab.faults(is_theirs=True) == []
    finally:
        tab.close()


def test_a_page_is_printed_with_nothing_folded(browser, book, tmp_path):
    """All lines of all cells, those of folded ones as well; the frame of a recording in view."""
    name = "book/life_of_a_request"
    pdf.print_page(browser.program, name, tmp_path / "a.pdf")
    printed = "".join(page.extract_text() for page in PdfReader(tmp_path / "a.pdf").pages)
    cells = json.loads((ROOT / f"{name}.ipynb").read_text("utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    flat = re.sub(r"\s", "", printed)
    missing = [line for line in code.splitlines() if re.sub(r"\s", "", line) not in flat]
    assert missing == [] and "step4of" in flat and "step5of" not in flat


def test_terms_of_a_chapter_lead_to_the_glossary_and_each_once(book):
    glossary = (BUILT / "book/glossary.html").read_text("utf-8")
    for page in (page for page in PAGES if page.startswith("chapters/")):
        text = (BUILT / f"{page}.html").read_text("utf-8")
        found = re.findall(r'<a class="term[^"]*" href="../book/glossary.html#([^"]+)"', text)
        assert len(found) == len(set(found)) > 2, (page, found)
        assert all(f'id="{place}"' in glossary for place in found)


def test_a_page_says_what_it_is_to_those_who_link_to_it(book):
    for page in PAGES:
        text = (BUILT / f"{page}.html").read_text("utf-8")
        told = re.findall(r'<meta name="description" content="([^"]+)"', text)
        assert len(told) == 1 and len(told[0]) > 30, (page, told)
        assert 'rel="icon"' in text


def test_the_package_of_each_chapter_is_a_file_that_the_set_up_links(book):
    links = re.findall(r'href="../(stages/[^"]+)"', (BUILT / "book/setup.html").read_text("utf-8"))
    assert len(links) == last()
    for number, link in enumerate(links, start=1):
        with zipfile.ZipFile(BUILT / link) as file:
            files = {name: file.read(name).decode() for name in file.namelist()}
        assert files.pop("LICENSE")
        assert files == {**INIT, **stage(number)}

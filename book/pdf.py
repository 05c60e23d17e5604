"""The rendered book as one PDF, printed by Chromium: `make pdf`.

Needs the built pages, and a Chromium. Prints where the file is.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from pypdf import PageObject, PdfWriter
from pypdf.generic import ArrayObject, NameObject

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "_build" / "html"
BROWSERS = "chromium", "chromium-browser", "google-chrome"
# Cells and solutions; the diffs of a chapter stay folded.
FOLDED = r"<details( class=\"[^\"]*(?:above-input|dropdown)[^\"]*\")"
PATIENCE_MS = 20_000  # of the page's own clock: formulas are set by then


def pages() -> Iterator[str]:
    """The pages in the order of the table of contents, as paths without an ending."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    yield toc["root"]
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            yield chapter["file"]


def print_page(browser: str, page: str, out: Path) -> str:
    """Print a page, its cells and solutions unfolded; its title. RuntimeError if it fails."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--virtual-time-budget={PATIENCE_MS}", f"--print-to-pdf={out}"]
    unfolded = BUILT / f"{page}.print.html"  # beside the page: its links are relative
    text = (BUILT / f"{page}.html").read_text("utf-8")
    unfolded.write_text(re.sub(FOLDED, r"<details open\1", text), "utf-8")
    try:
        command.append(unfolded.as_uri())
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        unfolded.unlink()
    if not out.is_file():
        raise RuntimeError(f"{page} was not printed: {done.stderr.strip()[-500:]}")
    return html.unescape(re.search("<title>(.*?)</title>", text, re.DOTALL)[1]).partition(" — ")[0]


def drop_local_links(sheet: PageObject) -> None:
    """Links to other pages are files of this machine: on paper they lead nowhere."""
    kept = ArrayObject()
    for one in sheet.get("/Annots", ()):
        action = one.get_object().get("/A", {})
        if not str(action.get("/URI", "")).startswith("file:"):
            kept.append(one)
    sheet[NameObject("/Annots")] = kept


def main(only: list[str]) -> None:
    """Print all pages, or those that are named, and put them together."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"a PDF is printed by a browser: none of {', '.join(BROWSERS)} is installed")
    whole, target = PdfWriter(), BUILT.parent / ("some_pages.pdf" if only else "nanovllm.pdf")
    with tempfile.TemporaryDirectory() as folder:
        for number, page in enumerate(only or pages()):
            part = Path(folder, f"{number}.pdf")
            whole.append(part, outline_item=print_page(browser, page, part))
        for sheet in whole.pages:
            drop_local_links(sheet)
        whole.write(target)
    print(f"{target.relative_to(ROOT)}: {len(whole.pages)} pages")


if __name__ == "__main__":
    main(sys.argv[1:])

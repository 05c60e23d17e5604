"""The repository itself: its top level, its links, its table of contents, its set-up."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOP = set(
    "README.md LICENSE Makefile pyproject.toml constraints.txt _config.yml _toc.yml "
    ".ci .gitignore book chapters nanovllm tests".split()
)
# Places of a machine that a file must not name, put together here so that this file does not.
PLACES = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["root", "work", "workspace"]) + r")/\w")


@functools.cache
def tracked() -> list[str]:
    """The files of the repository, ignored ones left out; also where nothing is committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.fail(f"git cannot list the repository: {listing.stderr.strip()}")
    return sorted(name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file())


def text(name: str) -> str | None:
    """A file's text, or None where it is not text."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_top_level_stays_small() -> None:
    assert {name.split("/")[0] for name in tracked()} <= TOP


def test_no_file_names_a_place_of_one_machine() -> None:
    found = {}
    for name in tracked():
        if match := PLACES.search(text(name) or ""):
            found[name] = match[0]
    assert found == {}


def test_every_python_file_of_the_package_parses() -> None:
    for name in tracked():
        if name.endswith(".py"):
            ast.parse(text(name), filename=name)


def test_bundled_model_stays_under_8_mb(tiny: Path) -> None:
    assert sum(path.stat().st_size for path in tiny.iterdir()) < 8_000_000


LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)")


@pytest.mark.parametrize("name", [name for name in tracked() if name.endswith(".md")])
def test_links_to_local_files_resolve(name: str) -> None:
    page = re.sub(r"```.*?```|`[^`]*`", "", text(name), flags=re.DOTALL)
    broken = []
    for target in LINK.findall(page):
        path = target.partition("#")[0]
        if not path or re.match(r"[a-z]+:", path):
            continue
        if not (ROOT / name).parent.joinpath(path).exists():
            broken.append(target)
    assert broken == []


def test_table_of_contents_and_folders_agree() -> None:
    toc = yaml.safe_load(text("_toc.yml"))
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    for entry in [toc["root"], *listed]:
        assert any((ROOT / f"{entry}{end}").exists() for end in (".md", ".ipynb")), entry
    books = [*ROOT.glob("chapters/*.ipynb"), *ROOT.glob("book/*.ipynb")]
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in books} <= set(listed)
    for part in toc["parts"]:  # chapter 0 is an appendix, all others are counted by the book
        files = [chapter["file"] for chapter in part["chapters"]]
        found = [int(Path(file).name[:2]) for file in files if file.startswith("chapters/")]
        assert found == (list(range(1, len(files) + 1)) if part.get("numbered") else found and [0])


def test_every_citation_has_an_entry() -> None:
    keys = re.findall(r"^@\w+\{([^,]+),", text("book/references.bib"), re.MULTILINE)
    assert len(set(keys)) == len(keys)
    pages = [n for n in tracked() if n.startswith(("book/", "chapters/")) and n[-3:] != ".py"]
    for name in pages:
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text(name) or ""):
            missing = {key.strip() for key in group.split(",")} - set(keys)
            assert not missing, f"{name} cites {missing}"


def test_constraints_pin_every_direct_dependency() -> None:
    project = text("pyproject.toml")
    names = "dependencies|book|test|clients"
    tables = re.findall(rf"^(?:{names}) = \[(.*?)^\]", project, re.M | re.DOTALL)
    wanted = {n.lower() for t in tables for n in re.findall(r'^ +"([\w-]+)', t, re.M)}
    pinned = {n.lower() for n in re.findall(r"^([\w-]+)==", text("constraints.txt"), re.M)}
    wanted -= {"nanovllm"}  # a table may take in another
    assert wanted and wanted <= pinned


def test_module_and_console_script_are_one_program() -> None:
    assert 'nanovllm = "nanovllm.__main__:main"' in text("pyproject.toml")
    command = [sys.executable, "-m", "nanovllm", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "generate" in shown.stdout


@pytest.mark.parametrize("page", [name for name in tracked() if re.match(r"book/.*\.md$", name)])
def test_every_test_that_a_page_names_is_there(page):
    """As a function or as a file: a page that promises a test must not outlive it."""
    tests = [name for name in tracked() if re.match(r"tests/.*test_\w+\.py$", name)]
    there = {Path(name).name for name in tests}
    there |= {
        found for name in tests for found in re.findall(r"def (test_\w+)\(", text(name) or "")
    }
    named = set(re.findall(r"`(?:[\w/]*/)?(test_\w+(?:\.py)?)`", text(page) or ""))
    assert named <= there, named - there

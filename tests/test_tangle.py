"""The tangle's rules, each on a book of a few cells."""

# ruff: noqa: E501

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tangle

ROOT = Path(__file__).resolve().parents[1]
M = "nanovllm/m.py"


def export(source: str, path: str = M) -> str:
    """The text of an export cell."""
    return f"#| export: {path}\n{dedent(source).strip()}"


def write_book(root: Path, *chapters: list[str]) -> Path:
    """Notebooks with one markdown cell and these code cells; returns the chapters' folder."""
    folder = root / "chapters"
    folder.mkdir(parents=True, exist_ok=True)
    for number, sources in enumerate(chapters, start=1):
        code = [{"cell_type": "code", "source": source.splitlines(True)} for source in sources]
        cells = [{"cell_type": "markdown", "source": ["# A chapter"]}, *code]
        (folder / f"{number:02}_chapter.ipynb").write_text(json.dumps({"cells": cells}))
    return folder


def merged(tmp_path: Path, *chapters: list[str]) -> str:
    """The module that the chapters leave."""
    return tangle.stage(99, write_book(tmp_path, *chapters))[M]


RULES = {
    "a function is replaced where it stands, its comment with it": (
        ["# old why\ndef a():\n    return 1\n\n\ndef b():\n    pass", "# new why\ndef a():\n    return 2"],
        "# new why\ndef a():\n    return 2\n\n\ndef b():\n    pass\n",
    ),
    "a new name goes before the next name that the module has": (
        ["def a(): ...\n\n\ndef c(): ...", "def b(): ...\n\n\ndef c(): ..."],
        "def a(): ...\n\n\ndef b(): ...\n\n\ndef c(): ...\n",
    ),
    "a new name goes after its predecessor in the cell": (
        ["def a(): ...\n\n\ndef c(): ...", "def a(): ...\n\n\ndef b(): ..."],
        "def a(): ...\n\n\ndef b(): ...\n\n\ndef c(): ...\n",
    ),
    "a name without a neighbour goes to the end, before the main guard": (
        ['A = 1\n\nif __name__ == "__main__":\n    print(A)', "B = 2"],
        'A = 1\nB = 2\n\nif __name__ == "__main__":\n    print(A)\n',
    ),
    "a reopened class keeps its base, decorator and docstring": (
        [
            '@deco\nclass X(Base):\n    """Doc."""\n\n    def a(self):\n        return 1\n\n    def c(self): ...',
            "class X(X):\n    def a(self):\n        return 2\n\n    def b(self): ...",
        ],
        '@deco\nclass X(Base):\n    """Doc."""\n\n    def a(self):\n        return 2\n\n'
        "    def b(self): ...\n\n    def c(self): ...\n",
    ),
    "a reopening that brings a docstring replaces it": (
        ['class X:\n    """Old."""\n\n    a: int = 1', 'class X(X):\n    """New."""'],
        'class X:\n    """New."""\n\n    a: int = 1\n',
    ),
    "a new field goes after the last field": (
        ["class X:\n    a: int = 1\n\n    def f(self): ...", "class X(X):\n    b: int = 2  # why"],
        "class X:\n    a: int = 1\n    b: int = 2  # why\n\n    def f(self): ...\n",
    ),
    "a class without the reopening form is replaced as a whole": (
        ["class X:\n    def a(self): ...", "class X:\n    def b(self): ..."],
        "class X:\n    def b(self): ...\n",
    ),
    "a property and its setter are one name": (
        [
            "class X:\n    @property\n    def a(self): ...\n\n    @a.setter\n    def a(self, v): ...",
            "class X(X):\n    @property\n    def a(self):\n        return 3",
        ],
        "class X:\n    @property\n    def a(self):\n        return 3\n",
    ),
    "imports are united, sorted, and dropped when nothing uses them": (
        ["import os\nimport sys\n\nA = sys.path", "from b import d, c\n\nB = c, d", "import numpy as np\n\nC = np"],
        "import sys\n\nimport numpy as np\nfrom b import c, d\n\nA = sys.path\n\nB = c, d\n\nC = np\n",
    ),
    "future imports come first": (
        ["import sys\n\nA = sys", "from __future__ import annotations\n\nB = 1"],
        "from __future__ import annotations\n\nimport sys\n\nA = sys\n\nB = 1\n",
    ),
    "an import from the module itself is dropped": (
        ["class X:\n    a = 1", "from nanovllm.m import X\n\n\nclass X(X):\n    b = 2"],
        "class X:\n    a = 1\n    b = 2\n",
    ),
    "a leading docstring becomes the module's": (
        ["A = 1", '"""About it."""\n\nB = 2'],
        '"""About it."""\n\nA = 1\n\nB = 2\n',
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_merging_keeps_the_rule(rule, tmp_path):
    cells, expected = RULES[rule]
    assert merged(tmp_path, *[[export(cell)] for cell in cells]) == expected
    assert merged(tmp_path / "one chapter", [export(cell) for cell in cells]) == expected


def test_names_and_members_and_modules_are_deleted(tmp_path):
    first = [
        export("class X:\n    a = 1\n    b = 2\n\n\ndef f(): ..."),
        export("A = 1", "nanovllm/n.py"),
    ]
    gone = [f"#| delete: {M}::X.a, f", "#| delete: nanovllm/n.py"]
    assert tangle.stage(2, write_book(tmp_path, first, gone)) == {M: "class X:\n    b = 2\n"}
    rest = write_book(tmp_path, first, gone, [f"#| delete: {M}::X\n# it is not needed"])
    assert tangle.stage(3, rest) == {}


ERRORS = {
    "does not parse": ("A = (", 2, "does not parse"),
    "loose statement": ("A = 1\nprint(A)", 3, "only imports"),
    "star import": ("from os import *", 2, "star"),
    "relative import": ("from .x import y", 2, "relative"),
    "no class to reopen": ("A = 1\n\n\nclass Y(Y):\n    a = 1", 5, "Y is reopened"),
    "super in a reopening": (
        "class X(X):\n    def f(self):\n        return super().f()",
        4,
        "super",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_chapter_cell_and_line(case, tmp_path):
    source, line, message = ERRORS[case]
    folder = write_book(tmp_path, [export("class X:\n    a = 1")], ["1 + 1", export(source)])
    with pytest.raises(tangle.TangleError, match=message) as error:
        tangle.stage(2, folder)
    assert f"02_chapter.ipynb, cell 3, line {line}:" in str(error.value)


@pytest.mark.parametrize(
    "directive",
    ["#| exports: nanovllm/m.py", "#| export: elsewhere/m.py", "#| delete: nanovllm/m.py::nothing"],
)
def test_bad_directive_is_an_error(directive, tmp_path):
    folder = write_book(tmp_path, [export("A = 1"), directive])
    with pytest.raises(tangle.TangleError, match="cell 3, line 1"):
        tangle.stage(1, folder)


NAMES = st.sampled_from("abcdef")
CELLS = st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3, unique=True), st.integers(0, 9)))


@settings(max_examples=60, deadline=None)
@given(chapters=st.lists(CELLS, min_size=1, max_size=4))
def test_a_stage_depends_on_its_chapters_alone(chapters, tmp_path_factory):
    book = [
        [export("\n\n\n".join(f"def {n}():\n    return {v}" for n in names)) for names, v in cells]
        for cells in chapters
    ]
    whole = write_book(tmp_path_factory.mktemp("whole"), *book)
    for k in range(1, len(book) + 1):
        part = write_book(tmp_path_factory.mktemp("part"), *book[:k])
        stage = tangle.stage(k, whole)
        assert stage == tangle.stage(k, part) == tangle.stage(k, whole)
        latest = {n: v for cells in chapters[:k] for names, v in cells for n in names}
        scope: dict = {}
        exec(stage.get(M, ""), scope)
        assert {n: scope[n]() for n in "abcdef" if n in scope} == latest


def tool(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a copy of the tool on a book."""
    (root / "chapters/tangle.py").write_text((ROOT / "chapters/tangle.py").read_text())
    command = [sys.executable, str(root / "chapters/tangle.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_check_names_the_chapter_of_a_changed_character(tmp_path):
    book = ([export("def a():\n    return 1")], [export("def b():\n    return 1")])
    write_book(tmp_path, *book)
    assert tool(tmp_path).returncode == 0
    assert tool(tmp_path, "--check").returncode == 0
    write_book(tmp_path, book[0], [export("def b():\n    return 2")])
    checked = tool(tmp_path, "--check")
    assert checked.returncode == 1
    assert "02_chapter.ipynb" in checked.stdout and "01_chapter" not in checked.stdout


def test_writing_twice_changes_nothing_and_removes_strangers(tmp_path):
    write_book(tmp_path, [export("A = 1")])
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm/stranger.py").write_text("B = 2")
    assert "m.py" in tool(tmp_path).stdout
    assert [p.name for p in (tmp_path / "nanovllm").glob("*.py")] == ["m.py"]
    assert tool(tmp_path).stdout == "nothing to change\n"


def test_impact_tells_what_later_chapters_keep(tmp_path):
    write_book(tmp_path, [export("A = 1\nB = 1")], [export("B = 2")])
    report = tool(tmp_path, "--impact", "1").stdout
    assert "stage 2: 1 names of chapter 1" in report and f"{M}::B" in report


def test_a_name_defined_too_often_fails_the_count(tmp_path):
    chapters = [[export(f"A = {k}")] for k in range(4)]
    write_book(tmp_path, *chapters[:3])
    assert tool(tmp_path, "--count").returncode == 0
    write_book(tmp_path, *chapters)
    assert tool(tmp_path, "--count").returncode == 1


@pytest.mark.parametrize("arguments", [["--upto", "7", "--out", "x"], ["--upto", "1"], ["--bogus"]])
def test_bad_arguments_exit_with_2(arguments, tmp_path):
    write_book(tmp_path, [export("A = 1")])
    assert tool(tmp_path, *arguments).returncode == 2


def test_merge_error_exits_with_2_and_one_line(tmp_path):
    write_book(tmp_path, [export("print(1)")])
    failed = tool(tmp_path)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1


def test_every_real_stage_is_clean(tmp_path):
    for k in range(1, len(tangle.chapters()) + 1):
        out = tmp_path / str(k)
        tangle.write_stage(k, out)
        config = ["--config", str(ROOT / "pyproject.toml")]
        for command in (["format", "--check"], ["check", "--ignore", "I001"]):
            ran = subprocess.run(
                [sys.executable, "-m", "ruff", *command, *config, str(out)],
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stdout

"""The tangle's rules, each on a book of a few cells."""

# ruff: noqa: E501

import json
import re
import shutil
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


def write_book(root: Path, *chapters: list[str], first: int = 1) -> Path:
    """Notebooks with one markdown cell and these code cells; returns the chapters' folder."""
    folder = root / "chapters"
    folder.mkdir(parents=True, exist_ok=True)
    for number, sources in enumerate(chapters, start=first):
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
    "a comment that ends a function stays with it": (
        ["def a():\n    return 1\n    # the end\n\n\ndef b(): ...", "def b():\n    return 2"],
        "def a():\n    return 1\n    # the end\n\n\ndef b():\n    return 2\n",
    ),
    "a comment that stands apart outlives what is below it": (
        ["def a(): ...\n\n\n# ---- part two\n\n\ndef b(): ...", "def b():\n    return 2"],
        "def a(): ...\n\n\n# ---- part two\n\n\ndef b():\n    return 2\n",
    ),
    "a class on one line is a name like any other": (
        ["class A(Exception): ...\n\n\nclass B(A): ...", "class A(ValueError): ..."],
        "class A(ValueError): ...\n\n\nclass B(A): ...\n",
    ),
    "a string below a field belongs to it": (
        ['class X:\n    a: int = 1\n    """Of a."""\n    b: int = 2', 'class X(X):\n    a: int = 3\n    """New."""'],
        'class X:\n    a: int = 3\n    """New."""\n    b: int = 2\n',
    ),
    "names assigned together are replaced together": (
        ["a, b = 1, 2\nc = 3", "b, a = 4, 5"],
        "b, a = 4, 5\nc = 3\n",
    ),
    "type-only imports stand above every name": (
        ["def a(): ...", "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import x\n\n\ndef b(): ..."],
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import x\n\n\ndef a(): ...\n\n\ndef b(): ...\n",
    ),
    "an import takes the place of another that binds its name": (
        ["from a import x\n\nA = x", "from b import x\n\nB = x"],
        "from b import x\n\nA = x\n\nB = x\n",
    ),
    "a definition takes the place of an import that binds its name": (
        ["from a import x\n\nA = x", "def x(): ..."],
        "A = x\n\n\ndef x(): ...\n",
    ),
    "noqa keeps an import, and a comment stays with its name": (
        ["from b import d  # noqa: F401", "from b import c\n\nC = c"],
        "from b import (\n    c,\n    d,  # noqa: F401\n)\n\nC = c\n",
    ),
    "what __all__ names is used": (
        ['from a import b\n\n__all__ = ["b"]'],
        'from a import b\n\n__all__ = ["b"]\n',
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


def test_merging_yields_what_ruff_would(tmp_path):
    """Layout and import order, on modules where both are hard; `src` makes nanovllm its own."""
    imports = """
        from __future__ import annotations
        import os, sys
        import torch.nn.functional as F
        import torch
        from nanovllm.utils.context import get_context
        from m import Abc, MAX, a10, a9, F as G, zeta
        from a_module_with_a_rather_long_name import first_imported_name, second_imported_name, third_one
    """.strip()
    names = "os, sys, F, torch, get_context, Abc, MAX, a10, a9, G, zeta, "
    names += "first_imported_name, second_imported_name, third_one"
    book = [
        [
            export('"""About it."""\n\n' + dedent(f"        {imports}") + f"\n\nALL = [{names}]"),
            export(
                "# ---- part\n\nN = 1\n# of f\n\n\n# just above\ndef f():\n    return 1\n    # end"
            ),
            export(
                "class X:\n    # first\n    a: int = 1\n\n    # apart\n\n    def f(self):\n        return 0\n\n    # last"
            ),
        ],
        [
            export(
                "class X(X):\n    b: int = 2\n\n    def f(self):\n        return 1\n\n    def g(self): ..."
            ),
            export("M = 2\n\n\n# ---- end\n\n\n@decorated\ndef f(): ..."),
        ],
    ]
    folder = write_book(tmp_path, *book)
    for k in (1, 2):
        tangle.write_stage(k, tmp_path / str(k), folder)
        options = ["--isolated", "--line-length", "100", str(tmp_path / str(k))]
        text = (tmp_path / str(k) / M).read_text().replace(f"ALL = [{names}]", "ALL = 1")
        (tmp_path / str(k) / M).write_text(text)
        for command in (["format", "--diff"], ["check", "--select", "I", "--diff"]):
            ran = subprocess.run(
                [sys.executable, "-m", "ruff", *command, *options], capture_output=True, text=True
            )
            assert ran.returncode == 0, ran.stdout


def test_names_and_members_and_modules_are_deleted(tmp_path):
    first = [
        export("class X:\n    a = 1\n    b = 2\n\n\ndef f(): ..."),
        export("A = 1", "nanovllm/n.py"),
    ]
    gone = [f"#| delete: {M}::X.a, f", "#| delete: nanovllm/n.py"]
    assert tangle.stage(2, write_book(tmp_path, first, gone)) == {M: "class X:\n    b = 2\n"}
    rest = write_book(tmp_path, first, gone, [f"#| delete: {M}::X\n# it is not needed"])
    assert tangle.stage(3, rest) == {}


def test_package_keeps_its_exports_until_they_are_deleted(tmp_path):
    init = "nanovllm/__init__.py"
    first = [export("from nanovllm.a import b, c\n\nA = 1", init)]
    folder = write_book(tmp_path, first, [f"#| delete: {init}::A, b"])
    assert tangle.stage(2, folder) == {init: "from nanovllm.a import c\n"}
    self_import = [export("from nanovllm import A\n\nB = A", init)]
    folder = write_book(tmp_path, first, self_import)
    assert "from nanovllm import" not in tangle.stage(2, folder)[init]


ERRORS = {
    "two statements on a line": ("A = 1\nB = 1; C = 2", 3, "lines of its own"),
    "a name twice in a cell": ("A = 1\n\n\ndef A(): ...", 5, "A is defined twice"),
    "half of an assignment": ("p = 1", 2, "q was assigned together"),
    "other bases in a reopening": ("class X(X, M):\n    b = 1", 2, "keeps its bases"),
    "loose statement in a reopening": (
        "class X(X):\n    b = 1\n    print(b)",
        4,
        "only imports, functions, classes and assignments",
    ),
    "comment above an import": ("# why\nimport os\n\nA = os", 3, "comment beside"),
    "directive below the top": ("A = 1\n#| delete: nanovllm/m.py::X", 3, "stands at the top"),
    "a notebook's own syntax": ("%time A = 1", 2, "does not parse"),
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
    first = [export("class X:\n    a = 1\n\n\np, q = 1, 2")]
    folder = write_book(tmp_path, first, ["1 + 1", export(source)])
    with pytest.raises(tangle.TangleError, match=message) as error:
        tangle.stage(2, folder)
    assert f"02_chapter.ipynb, cell 3, line {line}:" in str(error.value)


@pytest.mark.parametrize(
    "directive",
    [
        "#| exports: nanovllm/m.py",
        "#| export: elsewhere/m.py",
        "#| export: nanovllm/../m.py",
        "#| delete: nanovllm/m.py::nothing",
        "#| delete: nanovllm/m.py::A.nothing",
        "#| delete: nanovllm/nothing.py",
    ],
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
    for file in (ROOT / "chapters").glob("*.py"):
        shutil.copy(file, root / "chapters")
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


def test_check_names_only_the_chapter_that_wrote_the_difference(tmp_path):
    later = [export("class X(X):\n    def b(self):\n        return self.a()")]
    book = ([export("class X:\n    def a(self):\n        return 1")], later)
    write_book(tmp_path, *book)
    assert tool(tmp_path).returncode == 0
    write_book(tmp_path, [export("class X:\n    def a(self):\n        return 2")], later)
    checked = tool(tmp_path, "--check")
    assert checked.returncode == 1
    assert "01_chapter.ipynb" in checked.stdout and "02_chapter" not in checked.stdout


def test_folder_without_chapters_costs_nobody_a_package(tmp_path):
    write_book(tmp_path)
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm/m.py").write_text("A = 1")
    assert tool(tmp_path).returncode == 2
    assert (tmp_path / "nanovllm/m.py").exists()


def test_stage_shares_data_but_no_folder_with_the_package(tmp_path):
    folder = write_book(tmp_path, [export("A = 1", "nanovllm/kernels/k.py")])
    (tmp_path / "nanovllm/kernels/__pycache__").mkdir(parents=True)
    (tmp_path / "nanovllm/tiny").mkdir()
    (tmp_path / "nanovllm/tiny/config.json").write_text("{}")
    (tmp_path / "nanovllm/later.py").write_text("B = 1")
    out = tmp_path / "out"
    for _ in range(2):
        tangle.write_stage(1, out, folder)
        made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        code = {"nanovllm/__init__.py", "nanovllm/kernels/k.py"}
        assert made == {*code, "nanovllm/tiny/config.json"}
    assert not (tmp_path / "nanovllm/kernels/k.py").exists()


def test_an_installed_package_does_not_shine_through(tmp_path):
    folder = write_book(tmp_path, [export("A = 1", "nanovllm/kernels/k.py")])
    tangle.write_stage(1, tmp_path / "out", folder)
    for path in ("kernels/other.py", "engine/other.py", "__init__.py"):
        installed = tmp_path / "installed/nanovllm" / path
        installed.parent.mkdir(parents=True, exist_ok=True)
        installed.write_text("")
    program = f"""
import importlib, sys
sys.path[:0] = [{str(tmp_path / "out")!r}, {str(tmp_path / "installed")!r}]
import nanovllm.kernels.k
assert list(nanovllm.__path__) == [{str(tmp_path / "out/nanovllm")!r}]
for name in ("nanovllm.kernels.other", "nanovllm.engine", "nanovllm.engine.other"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_two_chapters_of_one_number_and_a_broken_notebook_are_errors(tmp_path):
    folder = write_book(tmp_path, [export("A = 1")])
    (folder / "01_again.ipynb").write_text("{}")
    with pytest.raises(tangle.TangleError, match="same number"):
        tangle.stage(1, folder)
    (folder / "01_again.ipynb").rename(folder / "02_again.ipynb")
    with pytest.raises(tangle.TangleError, match="02_again.ipynb is not a notebook"):
        tangle.stage(2, folder)


def test_writing_twice_changes_nothing_and_removes_strangers(tmp_path):
    write_book(tmp_path, [export("A = 1")])
    (tmp_path / "nanovllm").mkdir()
    (tmp_path / "nanovllm/stranger.py").write_text("B = 2")
    assert "m.py" in tool(tmp_path).stdout
    assert [p.name for p in (tmp_path / "nanovllm").glob("*.py")] == ["m.py"]
    assert tool(tmp_path).stdout == "nothing to change\n"


def test_impact_tells_what_later_chapters_keep(tmp_path):
    first = export("A = 1\nB = 1\nC = 1\n\n\nclass X:\n    a = 1")
    write_book(
        tmp_path, [first], [export("B = 2\n\n\nclass X(X):\n    b = 1"), f"#| delete: {M}::C"]
    )
    report = tool(tmp_path, "--impact", "1").stdout
    assert "stage 2: 3 names of chapter 1" in report
    assert f"{M}::B (chapter 2)" in report
    assert f"{M}::C (deleted)" in report and f"{M}::X (reopened)" in report


APPENDIX = (  # chapters 0, 1 and 2
    [export("A = 0\nB = 0")],
    [export("A = 1\nC = 1")],
    [export("C = 2\nD = 2")],
)


def test_every_stage_starts_from_chapter_0(tmp_path):
    folder = write_book(tmp_path, *APPENDIX, first=0)
    assert [tangle.number(path) for path in tangle.chapters(folder)] == [0, 1, 2]
    assert tangle.last(folder) == 2
    assert tangle.stage(-1, folder) == {}
    assert tangle.stage(0, folder) == {M: "A = 0\nB = 0\n"}
    assert tangle.stage(1, folder) == {M: "A = 1\nC = 1\nB = 0\n"}
    whole = {M: "A = 1\nC = 2\nD = 2\nB = 0\n"}
    assert (
        tangle.stage(2, folder) == tangle.stage(99, folder) == tangle.stage(None, folder) == whole
    )


def test_chapters_are_named_by_their_numbers(tmp_path):
    folder = write_book(tmp_path, *APPENDIX, first=0)
    (folder / "02_chapter.ipynb").rename(folder / "04_chapter.ipynb")
    assert tangle.last(folder) == 4
    assert tangle.stage(3, folder) == tangle.stage(1, folder) != tangle.stage(4, folder)
    report = tool(tmp_path, "--impact", "0").stdout
    assert "stage 1: 1 names of chapter 0" in report and f"{M}::A (chapter 1)" in report
    assert f"{M}::C (chapter 4)" in tool(tmp_path, "--impact", "1").stdout
    with pytest.raises(tangle.TangleError, match="00_chapter.ipynb, cell 2, line 2:"):
        tangle.stage(0, write_book(tmp_path, [export("print(1)")], first=0))


def test_appendix_is_written_like_a_stage(tmp_path):
    write_book(tmp_path, *APPENDIX, first=0)
    for k, text in ((0, "A = 0\nB = 0\n"), (1, "A = 1\nC = 1\nB = 0\n")):
        assert tool(tmp_path, "--upto", str(k), "--out", str(tmp_path / "out")).returncode == 0
        assert (tmp_path / "out" / M).read_text() == text
    write_book(tmp_path / "none", [export("A = 1")])
    assert tool(tmp_path / "none", "--upto", "0", "--out", "x").returncode == 2


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


def test_names_that_a_chapter_does_not_define_are_the_packages():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821"]
    command += ["--output-format", "json", *map(str, tangle.chapters())]
    ran = subprocess.run(command, capture_output=True, text=True)
    undefined: dict[str, set[str]] = {}
    for finding in json.loads(ran.stdout):
        names = undefined.setdefault(finding["filename"], set())
        names |= {*re.findall("`(.*)`", finding["message"])}
    for chapter, names in undefined.items():
        stages = [tangle.package(tangle.number(chapter) + step) for step in (-1, 0)]
        modules = [module for stage in stages for module in stage.modules.values()]
        known = {name for module in modules for unit in module.units for name in unit.names}
        assert names <= known.union(*(module.imports for module in modules)), chapter


def test_every_real_stage_is_clean(tmp_path):
    for k in map(tangle.number, tangle.chapters()):
        out = tmp_path / str(k)
        tangle.write_stage(k, out)
        config = ["--config", str(ROOT / "pyproject.toml")]
        for command in (["format", "--check"], ["check"]):
            ran = subprocess.run(
                [sys.executable, "-m", "ruff", *command, *config, str(out)],
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stdout

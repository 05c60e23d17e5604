"""What the bars above export cells say, and the titles of folded cells."""

from types import SimpleNamespace

import pytest
from docutils import nodes
from docutils.utils import new_document
from test_tangle import export, write_book

import bars
import tangle

N = "nanovllm/deep/n.py"
FIRST = [
    export("A, B = 1, 2\n\n\nclass X:\n    def f(self): ...\n\n    def g(self): ..."),
    export("def n(): ...", N),
]
CASES = {
    "new names": (export("import os\n\nC = os\n\n\ndef h(): ..."), "m.py · new: C, h"),
    "a new file": (export('"""Doc."""\n\nA = 1', "nanovllm/o.py"), "o.py · new: A"),
    "a replaced class": (export("class X:\n    a = 1"), "m.py · replaces: X (chapter 1)"),
    "members, new and replaced": (
        export('class X(X):\n    """Doc."""\n\n    def g(self): ...\n\n    def h(self): ...'),
        "m.py · replaces: X.g (chapter 1) · new: X.h",
    ),
    "names of several chapters": (
        export("def n(): ...\n\n\ndef k(): ...", N),
        "deep/n.py · replaces: n (chapter 1) · new: k",
    ),
    "what this chapter defined": (export("def h(): ...", N), "deep/n.py · replaces: h (above)"),
    "members in a row": (
        export("class X(X):\n    def f(self): ...\n\n    def g(self): ...\n\n\nZ = 1"),
        "m.py · replaces: X.f, .g (chapter 1) · new: Z",
    ),
    "deleted names": ("#| delete: nanovllm/m.py::X.g, A, B", "m.py · deletes: A, B, X.g"),
    "a deleted file": (f"#| delete: {N}", "deep/n.py · deletes the file"),
    "deleted here, defined there": (
        f"#| delete: {N}::n\n" + export("def n(): ..."),
        "deep/n.py · deletes: n · nanovllm/m.py · new: n",
    ),
    "imports alone": (export("import os  # noqa: F401"), "m.py"),
    "a main guard": (export('if __name__ == "__main__":\n    print(1)'), "m.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bar_names_the_file_and_what_changes(case, tmp_path):
    source, expected = CASES[case]
    folder = write_book(tmp_path, FIRST, [export("def h(): ...", N), "print(1)", source])
    found = bars.bars(tangle.code(2, folder), "02_chapter.ipynb")
    assert found.keys() == {2, 4}
    assert bars.line(found[4]) == f"nanovllm/{expected}"


def test_bar_counts_chapters_by_their_numbers_and_names_the_latest(tmp_path):
    folder = write_book(tmp_path, FIRST, [export("A, B = 3, 4")], FIRST, first=0)
    found = bars.bars(tangle.code(2, folder), "02_chapter.ipynb")
    assert bars.line(found[2]).endswith("· replaces: A, B (chapter 1), X (chapter 0)")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\n\n# The clock of this page.\nx = 1", "The clock of this page."),
        ("import os\n\n\ndef f():\n    # inside\n    x = 1\n\n\ny = f()\ny = 2", "f, y"),
        ("%time 1", "code"),
        ("print(1)", "code"),
    ],
)
def test_fold_is_titled_with_its_first_comment_or_its_names(source, expected):
    assert bars.title(source) == expected


def test_page_shows_a_bar_or_a_titled_fold_for_each_export_cell(tmp_path):
    folder = write_book(
        tmp_path, FIRST, [export("A, B = 3, 4"), export("def n(): ...", N), "x = 1"]
    )
    page, read = folder / "02_chapter.ipynb", []
    env = SimpleNamespace(docname="02", doc2path=lambda _: str(page), note_dependency=read.append)
    document = new_document("page")
    for index, fold in ((1, None), (2, "input"), (3, "input")):
        cell = nodes.container("", nodes.literal_block("", "x = 1"))
        cell.attributes |= {"nb_element": "cell_code", "cell_index": index, "hide_mode": fold}
        document += cell
    bars.mark(SimpleNamespace(env=env), document)
    bar, shown, folded, other = document.children
    assert "nanovllm/m.py · replaces: A, B (chapter 1)</p>" in bar.astext()
    assert "prompt_show" not in shown
    assert folded["prompt_show"] == folded["prompt_hide"] == f"{N} · replaces: n (chapter 1)"
    assert other["prompt_show"] == "x"
    assert read == [str(folder / "01_chapter.ipynb"), str(page)]

"""What is stored in the notebooks is clean, and the tool that stores it keeps it so."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("book_execute", ROOT / "book/measure/execute.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

NOTEBOOKS = [str(path.relative_to(ROOT)) for path in tool.notebooks()]
CHAPTERS = [name for name in NOTEBOOKS if name.startswith("chapters/")]


def code_of(name: str) -> list[str]:
    notebook = tool.read(ROOT / name)
    return [tool.text_of(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebook_is_clean(name: str) -> None:
    assert tool.problems(tool.read(ROOT / name)) == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_notebook_is_normalised(name: str) -> None:
    notebook = tool.read(ROOT / name)
    assert tool.normalise(copy.deepcopy(notebook))["metadata"] == notebook["metadata"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_has_a_caption(name: str) -> None:
    for index, cell in enumerate(tool.read(ROOT / name)["cells"]):
        pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        if pictures:
            figure = cell["metadata"].get("mystnb", {}).get("figure", {})
            assert figure.get("caption"), f"cell {index} shows a picture without a caption"


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_starts_its_own_stage_and_ends_with_its_changes(name: str) -> None:
    number, code = int(Path(name).name[:2]), code_of(name)
    starts = [int(k) for k in re.findall(r"^tangle\.start\((\d+)\)", "\n".join(code), re.M)]
    assert starts == [number]
    assert any("tangle.changes()" in source for source in code)


# ---- the tool, on notebooks made here


def make(*cells: dict) -> dict:
    """A notebook that holds the given cells."""
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def code(source: str, *outputs: dict, count: int | None = None, **metadata: object) -> dict:
    """A code cell, its outputs stamped as its own; its id is made from its source."""
    if outputs:
        metadata["stamp"] = tool.stamp(source)
    return {
        "cell_type": "code",
        "execution_count": count,
        "id": f"id-{abs(hash(source))}",
        "metadata": metadata,
        "outputs": list(outputs),
        "source": source,
    }


def stream(text: str, name: str = "stdout") -> dict:
    return {"name": name, "output_type": "stream", "text": text}


def test_a_stamp_is_of_what_a_source_does_on_any_python() -> None:
    source = 'def f(x):\n    "A text."\n    return f"{x!r:>{2}} ä", None\n\n\nclass A:\n    pass\n'
    told = source.replace('"A text."', '"Another."') + "\n\n# a comment\n"
    assert tool.stamp(source) == tool.stamp(told) == "f332f391e5dd"  # whatever Python says so
    assert tool.stamp(source.replace("None", "0")) != tool.stamp(source)
    assert tool.stamp("'a'") != tool.stamp("'b'")


def test_it_is_told_which_modules_changed_since(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "RECORD", tmp_path / "executed.json")
    path = ROOT / NOTEBOOKS[1]
    assert tool.behind(path) is None
    tool.record(path)
    assert tool.behind(path) == []
    modules = json.loads(tool.RECORD.read_text())[path.name]
    assert "nanovllm/engine/llm_engine.py" in modules
    del modules["nanovllm/config.py"]
    modules |= {"nanovllm/engine/llm_engine.py": "other", "nanovllm/gone.py": "x"}
    tool.RECORD.write_text(json.dumps({path.name: modules}))
    changed = ["nanovllm/config.py", "nanovllm/engine/llm_engine.py", "nanovllm/gone.py"]
    assert tool.behind(path) == changed
    assert tool.in_words(changed).startswith("changed since: `nanovllm/config.py`, ")


def test_the_record_is_of_notebooks_that_are_there() -> None:
    assert set(tool.executed()) <= {Path(name).name for name in NOTEBOOKS}


def test_normalise_counts_cells_and_drops_what_is_volatile() -> None:
    result = {"data": {"text/plain": "2"}, "execution_count": 9, "output_type": "execute_result"}
    notebook = make(
        code("1 + 1", {**result, "metadata": {}}, count=9, execution={"x": "y"}, tags=["a"]),
        code("", count=4),
        code("print()", stream("a\n"), stream("b"), stream("c", "stderr"), count=7),
    )
    notebook["metadata"] = {"widgets": {}, "language_info": {"version": "3.11.7"}}
    first, empty, last = tool.normalise(notebook)["cells"]
    assert [first["execution_count"], empty["execution_count"]] == [1, None]
    assert (last["execution_count"], first["outputs"][0]["execution_count"]) == (2, 1)
    assert first["metadata"] == {"tags": ["a"], "stamp": tool.stamp("1 + 1")}
    assert [output["text"] for output in last["outputs"]] == ["a\nb", "c"]
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert "version" not in notebook["metadata"]["language_info"]
    assert tool.normalise(copy.deepcopy(notebook)) == notebook
    assert tool.problems(notebook) == []


def test_normalise_keeps_the_last_state_of_a_progress_bar() -> None:
    notebook = make(code("go()", stream("\r 0%", "stderr"), stream("\r100%\nend\n", "stderr")))
    (output,) = tool.normalise(notebook)["cells"][0]["outputs"]
    assert output["text"] == "100%\nend\n"


@pytest.mark.parametrize(
    ("output", "word"),
    [
        ({"output_type": "error", "ename": "E", "evalue": "v", "traceback": []}, "error"),
        (stream(f"see {ROOT}/nanovllm/llm.py\n"), "path of this machine"),
        (stream(f"see {Path.home()}/x\n"), "path of this machine"),
        (stream("see /tmp/stage3/nanovllm\n"), "path of this machine"),
        (stream("x.py:1: FutureWarning: y\n", "stderr"), "warning on stderr"),
        (stream("<A object at 0x7f00deadbeef>\n"), "memory address"),
        (
            {"output_type": "display_data", "data": {tool.WIDGET: {}}, "metadata": {}},
            "widget",
        ),
    ],
)
def test_problem_names_the_cell_and_what_is_wrong(output: dict, word: str) -> None:
    notebook = tool.normalise(make(code("fine"), code("bad", output)))
    (problem,) = tool.problems(notebook)
    assert problem.startswith("cell 1 (") and word in problem


def test_an_output_of_another_source_is_refused_and_layout_does_not_count() -> None:
    cell = code("print(1,  2)  # two numbers", stream("1 2\n"))
    notebook = tool.normalise(make(cell))
    cell["source"] = "print(1, 2)"
    assert tool.problems(notebook) == []
    cell["source"] = "print(1, 3)"
    (problem,) = tool.problems(notebook)
    assert problem.startswith("cell 0 (") and "not of this source" in problem
    del cell["metadata"]["stamp"]
    assert len(tool.problems(notebook)) == 1
    assert tool.problems(tool.stamped(notebook)) == []
    cell["outputs"] = []
    assert tool.normalise(notebook)["cells"][0]["metadata"] == {}


def test_a_url_and_a_picture_are_no_paths() -> None:
    picture = {"data": {"image/png": "ab/tmp/cd"}, "metadata": {}, "output_type": "display_data"}
    notebook = make(code("a", stream("https://example.org/tmp/x or a/tmp/b\n"), picture))
    assert tool.problems(tool.normalise(notebook)) == []


def test_execution_stores_outputs_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    cells = [code("import os; x = 2"), code(""), code("print(os.path.exists('a.ipynb'))\nx")]
    path.write_text(json.dumps(make(*cells)))
    assert tool.main([str(path)]) == 0
    stored = path.read_text()
    last = json.loads(stored)["cells"][2]
    assert last["execution_count"] == 2
    assert last["outputs"][0]["text"] == ["True\n"]
    assert last["outputs"][1]["data"]["text/plain"] == ["2"]
    assert tool.main(["--check", str(path)]) == 0
    assert tool.main([str(path)]) == 0
    assert path.read_text() == stored


def test_a_cell_that_fails_is_named_and_nothing_is_stored(tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps(make(code("raise ValueError('no such block')"))))
    before = path.read_text()
    assert tool.main([str(path)]) == 1
    assert "no such block" in capsys.readouterr().err
    assert path.read_text() == before

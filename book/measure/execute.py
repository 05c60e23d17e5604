"""Execute notebooks in place, and keep what is stored in them clean.

    python book/measure/execute.py [notebook ...]          execute, then store
    python book/measure/execute.py --check [notebook ...]  look only, execute nothing
    python book/measure/execute.py --behind                what changed since they were executed

Without a name it takes every notebook of chapters/ and book/. Each one runs from a fresh
kernel in its own folder. It is stored only when it is clean: no error, no warning, no path of
this machine, no widget, no memory address. Execution counts run 1..n, timestamps are
dropped and cell ids stay, so that a diff shows what changed and nothing else. A cell that has
outputs carries a stamp of the source that produced them: an output of other source is refused.
The package that it ran may change later: `executed.json` has a stamp of each of its modules, so
that it can be said of which pages the code has changed since.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "book/measure/executed.json"
sys.path.insert(0, str(ROOT / "chapters"))
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "name": "python", "pygments_lexer": "ipython3"}
VOLATILE = {"ExecuteTime", "collapsed", "execution", "papermill", "scrolled", "vscode"}
WIDGET = "application/vnd.jupyter.widget-view+json"
HERE = {str(ROOT), str(Path.home()), str(Path(tempfile.gettempdir()))}
LOCAL_PATH = re.compile(
    r"(?<![\w.~-])(?:/home|/Users|/root|/tmp|/var/folders|"
    + "|".join(re.escape(path) for path in sorted(HERE) if len(path) > 1)
    + r")/[\w.~-]"
)
WARNING = re.compile(r"\b\w*Warning\b|\bWARNING\b|\bwarning:")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def notebooks() -> list[Path]:
    """Every notebook of the book, chapters first."""
    return sorted((ROOT / "chapters").glob("*.ipynb")) + sorted((ROOT / "book").glob("*.ipynb"))


def text_of(value: str | list[str]) -> str:
    """The text of a multi-line field, which nbformat stores as a string or as its lines."""
    return value if isinstance(value, str) else "".join(value)


def is_docstring(node: object) -> bool:
    """Is this a statement that is nothing but a string?"""
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def shape_of(node: object) -> object:
    """A syntax tree as lists, without docstrings and what is empty: Pythons differ in that."""
    if isinstance(node, ast.AST):
        fields = [[name, shape_of(value)] for name, value in ast.iter_fields(node)]
        filled = [[name, value] for name, value in fields if value not in (None, [])]
        return [type(node).__name__, *filled]
    if isinstance(node, list):
        has_one = len(node) > 1 and is_docstring(node[0])
        return [shape_of(item) for item in node[has_one:]]
    return node if node is None else repr(node)


def stamp(source: str) -> str:
    """What a source does, as a short hash: layout, comments and docstrings don't count."""
    try:
        source = str(shape_of(ast.parse(source)))
    except SyntaxError:  # a magic, say: as it is
        pass
    return hashlib.sha1(source.encode()).hexdigest()[:12]


def read(path: Path) -> dict[str, Any]:
    """A notebook as plain JSON, every cell with an id."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["nbformat"], notebook["nbformat_minor"] = 4, max(5, notebook["nbformat_minor"])
    for index, cell in enumerate(notebook["cells"]):
        digest = hashlib.sha1(f"{index}:{text_of(cell['source'])}".encode()).hexdigest()
        cell.setdefault("id", digest[:8])
    return notebook


def write(path: Path, notebook: dict[str, Any]) -> None:
    """Store a notebook in nbformat's own layout: sorted keys, text as lines."""
    import nbformat

    path.write_text(nbformat.writes(nbformat.from_dict(notebook)) + "\n", encoding="utf-8")


def execute(path: Path, notebook: dict[str, Any], timeout: int) -> dict[str, Any]:
    """Run all cells in a fresh kernel; raises CellExecutionError with the traceback."""
    import nbformat
    from nbclient import NotebookClient

    # The bundled model's products are too small to share between threads: on a busy machine
    # threads that wait for one another make single steps ten times as slow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without ipywidgets a progress bar is text, which is what a page can show.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    node = nbformat.reads(json.dumps(notebook), as_version=4)
    client = NotebookClient(
        node,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
        extra_arguments=["--log-level=40"],  # the kernel's own notices are not the notebook's
    )
    client.execute()
    return json.loads(nbformat.writes(node))


def last_frame(text: str) -> str:
    """What a terminal would show: a carriage return starts the line again (progress bars)."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join([line.rstrip("\r").split("\r")[-1] for line in lines])


def merge_streams(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive pieces of one stream become one output; how they arrived is chance."""
    merged: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            output = {**output, "text": text_of(output["text"])}
            if merged and merged[-1].get("name") == output["name"]:
                merged[-1]["text"] += output["text"]
                continue
        merged.append(output)
    for output in merged:
        if output["output_type"] == "stream":
            output["text"] = last_frame(output["text"])
    return merged


def normalise(notebook: dict[str, Any]) -> dict[str, Any]:
    """Drop what differs between two runs of the same notebook; changes it in place."""
    metadata = notebook["metadata"]
    for key in VOLATILE | {"widgets"}:
        metadata.pop(key, None)
    metadata["kernelspec"], metadata["language_info"] = dict(KERNELSPEC), dict(LANGUAGE)
    count = 0
    for cell in notebook["cells"]:
        for key in VOLATILE:
            cell["metadata"].pop(key, None)
        if cell["cell_type"] != "code":
            continue
        runs = bool(text_of(cell["source"]).strip())
        count += runs
        cell["execution_count"] = count if runs else None
        cell["outputs"] = merge_streams(cell["outputs"])
        if not cell["outputs"]:
            cell["metadata"].pop("stamp", None)
        for output in cell["outputs"]:
            output.pop("transient", None)
            if output["output_type"] == "execute_result":
                output["execution_count"] = count
    return notebook


def stamped(notebook: dict[str, Any]) -> dict[str, Any]:
    """Mark what has just been executed: each output is of its cell's source; in place."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and cell["outputs"]:
            cell["metadata"]["stamp"] = stamp(text_of(cell["source"]))
    return notebook


def code_of(path: Path) -> dict[str, str]:
    """A stamp of each module that the cells of a notebook find: the package as of its chapter."""
    import stages

    is_chapter = path.resolve().parent == stages.HERE
    modules = stages.stage(stages.number(path) if is_chapter else stages.last())
    return {name: stamp(text) for name, text in sorted(modules.items())}


def executed() -> dict[str, dict[str, str]]:
    """By a notebook's name, what `code_of` gave when it was executed."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def record(path: Path) -> None:
    """Note with which code a notebook has just been executed."""
    text = json.dumps({**executed(), path.name: code_of(path)}, indent=1, sort_keys=True)
    RECORD.write_text(text + "\n", encoding="utf-8")


def behind(path: Path) -> list[str] | None:
    """Modules that have changed since a notebook was executed; None where there is no record."""
    then, now = executed().get(path.name), code_of(path)
    if then is None:
        return None
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


def in_words(changed: list[str] | None) -> str:
    """What `behind` found."""
    if changed is None:
        return "no record"
    if not changed:
        return "as it is now"
    few = ", ".join(f"`{name}`" for name in changed[:4])
    return f"changed since: {few}" + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def output_texts(output: dict[str, Any]) -> Iterator[str]:
    """The readable text of an output; an encoded picture is not text."""
    if output["output_type"] == "stream":
        yield text_of(output["text"])
    for mime, data in output.get("data", {}).items():
        if mime.startswith("text/") or mime == "image/svg+xml":
            yield text_of(data)


def output_problems(output: dict[str, Any]) -> Iterator[str]:
    """What must not be stored in one output."""
    if output["output_type"] == "error":
        yield f"an error is stored: {output['ename']}: {output['evalue']}"
    if WIDGET in output.get("data", {}):
        yield "a widget is stored, which a page cannot show"
    on_stderr = output.get("name") == "stderr"
    for text in output_texts(output):
        for line in text.splitlines():
            if LOCAL_PATH.search(line):
                yield f"a path of this machine: {line.strip()[:160]}"
            if ADDRESS.search(line):
                yield f"a memory address: {line.strip()[:160]}"
            if on_stderr and WARNING.search(line):
                yield f"a warning on stderr: {line.strip()[:160]}"


def problems(notebook: dict[str, Any]) -> list[str]:
    """Everything that keeps a notebook from being stored, each with its cell."""
    found = []
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("notebook: the kernel is not python3")
    if volatile := (VOLATILE | {"widgets"}) & set(notebook["metadata"]):
        found.append(f"notebook: volatile metadata {sorted(volatile)}")
    ids = [cell.get("id") for cell in notebook["cells"]]
    if None in ids or len(set(ids)) != len(ids):
        found.append("notebook: a cell id is missing or used twice")
    count = 0
    for index, cell in enumerate(notebook["cells"]):
        where = f"cell {index} ({cell.get('id')})"
        if volatile := VOLATILE & set(cell["metadata"]):
            found.append(f"{where}: volatile metadata {sorted(volatile)}")
        if cell["cell_type"] != "code":
            continue
        runs = bool(text_of(cell["source"]).strip())
        count += runs
        expected = count if runs else None
        if cell["execution_count"] != expected:
            number = cell["execution_count"]
            found.append(f"{where}: execution count is {number}, not {expected}: run it afresh")
        if cell["outputs"] and cell["metadata"].get("stamp") != stamp(text_of(cell["source"])):
            found.append(f"{where}: its output is not of this source: run it afresh")
        for output in cell["outputs"]:
            found += [f"{where}: {problem}" for problem in output_problems(output)]
    return found


def refresh(path: Path, timeout: int) -> list[str]:
    """Execute and store one notebook; returns the problems that kept it from being stored."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    start = time.perf_counter()
    try:
        notebook = stamped(normalise(execute(path, read(path), timeout)))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [str(error)]
    found = problems(notebook)
    if not found:
        write(path, notebook)
        if path.resolve() in notebooks():  # the book's own, whose package is known
            record(path)
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, metavar="notebook")
    parser.add_argument("--check", action="store_true", help="look only, execute nothing")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    parser.add_argument("--behind", action="store_true", help="what has changed since")
    options = parser.parse_args(arguments)
    if options.behind:
        for path in options.paths or notebooks():
            print(f"{path.name}: {in_words(behind(path))}")
        return 0
    failed = False
    for path in options.paths or notebooks():
        found = problems(read(path)) if options.check else refresh(path, options.timeout)
        for problem in found:
            print(f"{path}: {problem}", file=sys.stderr)
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

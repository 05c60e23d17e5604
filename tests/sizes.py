"""How large the package is, and how it hangs together: `python tests/sizes.py`.

Prints every size and what breaks a limit; ends with 1 where a limit is broken. A line of code is
one that is no docstring, no comment and not blank. A function is as long as from its `def` to its
end. An import counts wherever it stands, in a function and for a type checker too. A name is used
where the package mentions it outside of its own definition; two methods of one name count as one.
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "chapters"))

import tangle  # noqa: E402

MODULE_LINES = 250
FUNCTION_LINES, KERNEL_LINES = 40, 60
CELL_LINES = 40
PACKAGE_CODE = 8_107
SHOWN = 12  # of the longest functions
FOR_USERS = {  # what a program calls, and the package itself does not
    "engine/llm_engine.py::LLMEngine.reset_prefix_cache",
    "kernels/jit.py::interpreted",  # to run the kernels without a GPU
    "serve/engine_process.py::in_thread",  # to serve an engine that a program has already
}

# The rooms from top to bottom: an import goes to a room below, or to one on the same floor.
FLOORS = (
    {"__main__", "__init__", "bench", "latency", "workloads"},
    {"serve"},
    {"llm"},
    {"engine"},
    {"models"},
    {"layers"},
    {"kernels", "parallel"},
    {"config", "sampling_params", "utils"},
)
# What a caller's program uses, and what Python, torch and uvicorn call by name.
CALLERS = set(
    "LLM.generate LLM.stream LLM.chat LLM.abort LLM.add_request LLM.step LLM.is_finished LLM.exit "
    "main forward handle_exit check_integrity __getattr__ __dir__ __all__ __version__".split()
)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def modules() -> dict[str, str]:
    """Path -> source of the package's modules, e.g. engine/scheduler.py."""
    folder = ROOT / "nanovllm"
    paths = sorted(folder.rglob("*.py"))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def code_lines(source: str) -> int:
    """Lines that hold code."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*nothing, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def functions(sources: dict[str, str]) -> list[tuple[int, int, str]]:
    """(Lines, limit, name) of every function, the longest first."""
    found = []
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
                limit = KERNEL_LINES if is_kernel else FUNCTION_LINES
                found.append((node.end_lineno - node.lineno + 1, limit, f"{path}::{node.name}"))
    return sorted(found, reverse=True)


def cells() -> list[tuple[int, str]]:
    """(Lines, place) of every export cell, the longest first; its directives don't count."""
    found = []
    for cell in tangle.code():
        path, _ = cell.directives()
        lines = [line for line in cell.source.split("\n") if not line.startswith("#|")]
        if path:
            found.append((len(lines), f"{cell.chapter}, cell {cell.number}: {path}"))
    return sorted(found, reverse=True)


def cells_without_words() -> list[str]:
    """Export cells that stand open on the page with no paragraph before them."""
    found = []
    for path in tangle.chapters():
        before = ""
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
            is_open = "hide-input" not in cell["metadata"].get("tags", ())
            if "".join(cell["source"]).startswith("#| ") and is_open and before != "markdown":
                found.append(f"{path.name}, cell {number}")
            before = cell["cell_type"]
    return found


def imports(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    known = {path.removesuffix(".py").removesuffix("/__init__"): path for path in sources}
    graph: dict[str, set[str]] = {path: set() for path in sources}
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                head, _, rest = name.partition(".")
                if head == "nanovllm" and rest.replace(".", "/") in known:
                    graph[path].add(known[rest.replace(".", "/")])
    return graph


def room(path: str) -> str:
    """The part of the package that a module belongs to."""
    return path.split("/")[0].removesuffix(".py")


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A way round in a graph of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def bad_imports(graph: dict[str, set[str]]) -> Iterator[str]:
    """Imports that go up or round, and rooms that stand on no floor."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    yield from (f"{path} stands on no floor" for path in graph if room(path) not in floor)
    rooms: dict[str, set[str]] = {}
    for path, targets in graph.items():
        rooms.setdefault(room(path), set()).update({room(target) for target in targets})
        for target in sorted(targets):
            if floor.get(room(target), 0) < floor.get(room(path), 0):
                yield f"{path} imports {target}, which stands above it"
    if way := cycle(graph):
        yield "modules import one another in a circle: " + " -> ".join(way)
    within = {name: targets - {name} for name, targets in rooms.items()}
    if way := cycle(within):
        yield "rooms import one another in a circle: " + " -> ".join(way)


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """The public functions, classes, methods and constants of a module, with their nodes."""
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((n.id, node) for t in targets for n in ast.walk(t) if hasattr(n, "id"))
        if isinstance(node, ast.ClassDef):
            methods = (member for member in node.body if isinstance(member, ast.FunctionDef))
            yield from ((f"{node.name}.{method.name}", method) for method in methods)


def mentioned(node: ast.AST) -> Iterator[str]:
    """The names that stand in a node, as names, attributes or strings."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
            yield inner.id
        elif isinstance(inner, ast.Attribute):
            yield inner.attr
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def unused(sources: dict[str, str]) -> list[str]:
    """Public names that no other definition of the package mentions."""
    trees = {path: ast.parse(source) for path, source in sources.items()}
    uses: dict[str, int] = {}
    for tree in trees.values():
        for name in mentioned(tree):
            uses[name] = uses.get(name, 0) + 1
    found = []
    for path, tree in trees.items():
        for name, node in definitions(tree):
            last = name.rpartition(".")[2]
            elsewhere = uses.get(last, 0) - sum(own == last for own in mentioned(node))
            called = {last, name, name.replace("LLMEngine.", "LLM.")} & CALLERS
            if not elsewhere and not called and not last.startswith("_"):
                found.append(f"{path}::{name}")
    return found


def print_sizes(sources: dict[str, str], code: dict[str, int]) -> None:
    """Every module, and the longest functions and cells."""
    print("lines  code  module")
    for path, source in sources.items():
        print(f"{len(source.splitlines()):5} {code[path]:5}  {path}")
    print(f"{sum(len(s.splitlines()) for s in sources.values()):5} {sum(code.values()):5}  all")
    print("\nlines  function")
    print("\n".join(f"{lines:5}  {name}" for lines, _, name in functions(sources)[:SHOWN]))
    print("\nlines  export cell")
    print("\n".join(f"{lines:5}  {name}" for lines, name in cells()[:SHOWN]))


def broken(sources: dict[str, str], code: dict[str, int]) -> Iterator[str]:
    """Every limit that does not hold."""
    for path, source in sources.items():
        if (lines := len(source.splitlines())) > MODULE_LINES:
            yield f"{path} has {lines} lines, more than {MODULE_LINES}"
    for lines, limit, name in functions(sources):
        if lines > limit:
            yield f"{name} has {lines} lines, more than {limit}"
    for lines, name in cells():
        if lines > CELL_LINES:
            yield f"{name} has {lines} lines, more than {CELL_LINES}"
    yield from (f"{name} has no words before it" for name in cells_without_words())
    if (total := sum(code.values())) > PACKAGE_CODE:
        yield f"the package has {total} lines of code, more than {PACKAGE_CODE}"
    yield from bad_imports(imports(sources))
    idle = [name for name in unused(sources) if name not in FOR_USERS]
    yield from (f"{name} is used by nobody in the package" for name in idle)


def main() -> int:
    """Print all; 1 where a limit is broken."""
    sources = modules()
    code = {path: code_lines(source) for path, source in sources.items()}
    print_sizes(sources, code)
    problems = list(broken(sources, code))
    print("\n" + "\n".join(problems) if problems else "\nevery limit holds")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

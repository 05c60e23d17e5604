"""No module of the package, at any stage, holds state that engines would share."""

from __future__ import annotations

import ast

import pytest

import tangle

STAGES = range(1, tangle.last() + 1)
SWITCH = {"nanovllm/kernels/jit.py": ["_interpreted"]}  # for tests: kernels run on the CPU
EMPTY = ("dict", "list", "set", "defaultdict", "deque", "OrderedDict", "count")
# Ray reads its settings from nowhere else, and its processes are to have them, too.
SETTINGS = {"nanovllm/serve/ray_settings.py": ["os.environ["]}


def assigned(tree: ast.Module) -> list[str]:
    """Globals that a function assigns to."""
    return [name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names]


def filled_later(tree: ast.Module) -> list[str]:
    """Globals that begin as empty containers: somebody will put something in."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            value = node.value
            empty = isinstance(value, ast.Dict) and not value.keys
            empty |= isinstance(value, ast.List) and not value.elts
            empty |= isinstance(value, ast.Call) and ast.unparse(value.func) in EMPTY
            if empty:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("number", STAGES)
def test_no_module_keeps_state_between_engines(number):
    """Constants, and what is computed once for good, are no state."""
    for path, source in tangle.stage(number).items():
        tree = ast.parse(source)
        assert assigned(tree) == SWITCH.get(path, []), path
        assert filled_later(tree) == [], path


@pytest.mark.parametrize("number", STAGES)
def test_no_module_sets_what_is_the_whole_processs(number):
    """torch's defaults, the random generators, the number of threads."""
    named = ("set_default", "torch.manual_seed", "random.seed", "set_num_threads", "os.environ[")
    for path, source in tangle.stage(number).items():
        assert [name for name in named if name in source] == SETTINGS.get(path, []), path

"""What `tests/sizes.py` counts, and what it refuses, on modules of a few lines."""

from __future__ import annotations

import sizes

CODE = '''"""Doc,
of two lines."""

# why
def f(
    x,
):
    """Doc."""
    return """a
b"""
'''


def test_docstrings_comments_and_blank_lines_are_no_code():
    assert sizes.code_lines(CODE) == 5


def test_functions_are_measured_from_def_to_end_and_kernels_by_their_own_limit():
    plain = "def f(x):\n    y = x\n\n    return y\n"
    sources = {"a.py": plain, "kernels/b.py": "@triton.jit\n" + plain.replace("f(", "g(")}
    assert sizes.functions(sources) == [
        (4, sizes.KERNEL_LINES, "kernels/b.py::g"),
        (4, sizes.FUNCTION_LINES, "a.py::f"),
    ]


def refused(**sources: str) -> list[str]:
    """What is said about the imports of modules, named like engine__scheduler."""
    named = {f"{name.replace('__', '/')}.py": source for name, source in sources.items()}
    return list(sizes.bad_imports(sizes.imports(named)))


def test_imports_go_down():
    up = "def f():\n    from nanovllm.engine.scheduler import Scheduler\n"
    down = "import nanovllm.utils.context"
    assert refused(engine__scheduler=down, utils__context="") == []
    assert refused(engine__scheduler="", utils__context=up) == [
        "utils/context.py imports engine/scheduler.py, which stands above it"
    ]


def test_imports_go_round_neither_between_modules_nor_between_rooms():
    a, b = (f"from nanovllm.layers import {name}" for name in "ab")
    assert "in a circle: layers/" in refused(layers__a=b, layers__b=a)[0]
    config, utils = "from nanovllm.utils.a import x", "from nanovllm.config import Config"
    assert "rooms" in refused(config=config, utils__a="", utils__b=utils)[0]


def test_a_room_without_a_floor_is_refused():
    assert refused(attic="") == ["attic.py stands on no floor"]


NAMES = """
def f():
    return f()

def g():
    return _h

class C:
    def m(self):
        g()
"""


def test_a_name_that_only_itself_mentions_is_unused():
    assert sizes.unused({"a.py": NAMES}) == ["a.py::f", "a.py::C", "a.py::C.m"]

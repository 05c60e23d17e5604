"""The parts that decide are plain Python."""

import pytest
from test_imports import LOADED, python

PARTS = ("scheduler", "block_manager", "block", "sequence", "detokenizer")


@pytest.mark.parametrize("part", PARTS)
def test_what_decides_loads_no_torch(part):
    assert python(f"import nanovllm.engine.{part}\n{LOADED}").split() == []

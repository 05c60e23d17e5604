"""What several files of the server's tests compare with."""

from __future__ import annotations

import pytest
from device import build


@pytest.fixture(scope="module")
def offline():
    """An engine that nobody serves."""
    llm = build(dtype="float32")
    yield llm
    llm.exit()

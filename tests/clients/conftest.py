"""Clients that others have written, as they are, before `nanovllm serve`: `make clients`.

They are no part of `make test`: together they bring more than a hundred packages, which change
every week and which nobody needs to work on the engine. What they rely on is held there too, by
`tests/conformance/from_stage_12`, with the `openai` package, which most of them are made of.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "conformance")]
OFFLINE = "HF_HUB_OFFLINE HF_DATASETS_OFFLINE LITELLM_LOCAL_MODEL_COST_MAP"
os.environ |= dict.fromkeys(OFFLINE.split(), "1") | {"NO_PROXY": "127.0.0.1"}

NAME = "nanovllm-tiny"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The bundled model's folder."""
    return ROOT / "nanovllm" / "tiny"


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A server by the command line, on the CPU in float32."""
    from serving import Command

    command = Command("--device", "cpu", "--dtype", "float32", "--api-key", "sesame")
    try:
        yield f"http://127.0.0.1:{command.ready()}"
    finally:
        command.process.terminate()
        status, said = command.end()
    assert status == 0 and "Traceback" not in said, said


@pytest.fixture(scope="session")
def offline():
    """The same engine, without a server."""
    from nanovllm import LLM

    llm = LLM(device="cpu", dtype="float32")
    yield llm
    llm.exit()

"""Requests made from our own OpenAPI document, sound ones and others: none is a failure."""

from __future__ import annotations

import os

import pytest
import schemathesis
from device import build
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from serving import served

NUM_EXAMPLES = int(os.environ.get("NANOVLLM_EXAMPLES", 30))
WRITTEN = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
READ = "/v1/models", "/v1/models/{name}", "/health", "/metrics", "/"


@pytest.fixture(scope="module")
def server():
    llm = build(dtype="float32", max_model_len=64, kvcache_block_size=16, num_kvcache_blocks=300)
    with served(llm) as server:
        yield server
        server.settle()
        assert server.http.get("/health").status_code == 200
    llm.exit()


HOW = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(
    "path, mode",
    [(path, mode) for path in WRITTEN for mode in GenerationMode]
    + [(path, GenerationMode.POSITIVE) for path in READ],
    ids=str,
)
def test_nothing_of_our_document_is_a_failure_of_the_servers(server, path, mode):
    """Called by hand: the plug-in of schemathesis does not know each version of pytest."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (operation,) = document[path].values()
    seen = []

    @HOW
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        reply = case.call(timeout=60)
        seen.append(reply.status_code)
        assert reply.status_code < 500, (case.as_curl_command(), reply.text[:500])
        assert "Traceback" not in reply.text
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

    send()
    assert seen and (mode is GenerationMode.POSITIVE or max(seen) >= 400)


def test_the_document_names_every_route(server):
    assert set(server.http.get("/openapi.json").json()["paths"]) == {*WRITTEN, *READ}

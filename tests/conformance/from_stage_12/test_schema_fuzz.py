"""Requests made from our own OpenAPI document, sound ones and others: none is a failure."""

from __future__ import annotations

import os

import pytest
import schemathesis
from device import build
from hypothesis import HealthCheck, settings
from serving import served

NUM_EXAMPLES = int(os.environ.get("NANOVLLM_EXAMPLES", 30))
ALL = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/tokenize"}
ALL |= {"/detokenize", "/health", "/metrics", "/"}


@pytest.fixture(scope="module")
def server():
    llm = build(dtype="float32", max_model_len=64, kvcache_block_size=16, num_kvcache_blocks=300)
    with served(llm) as server:
        yield server
        server.settle()
        assert server.http.get("/health").status_code == 200
    llm.exit()


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_nothing_of_our_document_is_a_failure_of_the_servers(case):
    reply = case.call(timeout=60)
    assert reply.status_code < 500, (case.as_curl_command(), reply.text[:500])
    assert "Traceback" not in reply.text
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_the_document_names_every_route(server):
    assert set(server.http.get("/openapi.json").json()["paths"]) == ALL

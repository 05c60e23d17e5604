"""A grammar is read in a thread of its own, with the vocabulary's table that is there already."""

from __future__ import annotations

import asyncio
from threading import get_ident
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from nanovllm import LLM
from nanovllm.engine import guide
from nanovllm.serve.app import make_app
from nanovllm.serve.client import EngineClient
from nanovllm.serve.engine_process import in_thread
from nanovllm.serve.protocol import ChatRequest
from nanovllm.serve.server import Server
from nanovllm.serve.settings import ServeConfig

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
GRAMMARS = [
    {"response_format": {"type": "json_object"}},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
]
NONE = [{}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}]


@pytest.mark.parametrize(
    ("asked", "has_grammar"),
    [(asked, True) for asked in GRAMMARS] + [(asked, False) for asked in NONE],
    ids=["json", "required", "named", "plain", "tools", "auto"],
)
def test_whatever_has_a_grammar_is_built_in_another_thread(asked, has_grammar):
    body = ChatRequest(messages=[{"role": "user", "content": "hi"}], **asked)
    server = Server(SimpleNamespace(about=SimpleNamespace(model="tiny")), "tiny")
    request = Request({"type": "http", "headers": [(b"content-length", b"90")]})
    where = asyncio.run(server.built(request, body, lambda: [get_ident()]))
    assert (where != [get_ident()]) == has_grammar


def test_each_process_that_answers_has_its_table_before_anybody_asks(monkeypatch):
    pipe = in_thread(LLM(device="cpu"))
    client, made = EngineClient(pipe), []
    monkeypatch.setattr(guide, "token_table", lambda *asked: made.append(asked))
    make_app(client, ServeConfig())
    assert made == [(client.about.tokenizer, client.about.limits.vocab_size)]
    pipe.close()

"""The server answers with what `generate` says, whatever the architecture of its model."""

from __future__ import annotations

import shutil

import pytest
from device import build
from families import EACH, save_each
from serving import parsed, served

from nanovllm import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The fox", "Zoë 🦊"]
TALK = [{"role": "user", "content": "Tell me a story about a fox."}]
GREEDY = dict(temperature=0, max_tokens=16)
SCHEMA = {
    "type": "object",
    "properties": {"age": {"enum": [1, 2, 3]}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=EACH)
def served_family(request, bundled, tmp_path_factory):
    """(a server, an engine that nobody serves) on random weights with the bundled vocabulary."""
    folder, _ = save_each(tmp_path_factory.mktemp(request.param), request.param, vocab_size=1536)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(bundled / name, folder)
    options = dict(dtype="float32", num_kvcache_blocks=60, kvcache_block_size=16)
    llm, offline = build(folder, **options), build(folder, **options)
    with served(llm) as server:
        yield server, offline
        server.settle()
    for engine in (llm, offline):
        engine.exit()


def said(offline: LLM, prompts: list) -> list[str]:
    outputs = offline.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
    return [output["text"] for output in outputs]


def test_a_completion_says_what_generate_says(served_family):
    server, offline = served_family
    reply = server.post("/v1/completions", {"prompt": PROMPTS, **GREEDY})
    assert reply.status_code == 200, reply.text
    found = [choice["text"] for choice in parsed(reply.content)["choices"]]
    assert found == said(offline, PROMPTS) and len(set(found)) == len(found)


def test_a_chat_says_what_chat_says(served_family):
    server, offline = served_family
    reply = server.post("/v1/chat/completions", {"messages": TALK, **GREEDY})
    assert reply.status_code == 200, reply.text
    (choice,) = parsed(reply.content)["choices"]
    (expected,) = offline.chat(TALK, SamplingParams(**GREEDY), use_tqdm=False)
    assert choice["message"]["content"] == expected["text"].lstrip() != ""


def test_a_schema_holds_whatever_the_weights_say(served_family):
    server, _ = served_family
    schema = {"type": "json_schema", "json_schema": {"name": "age", "schema": SCHEMA}}
    asked = {"messages": TALK, "temperature": 0, "max_tokens": 60, "response_format": schema}
    reply = server.post("/v1/chat/completions", asked)
    assert reply.status_code == 200, reply.text
    (choice,) = parsed(reply.content)["choices"]
    assert choice["finish_reason"] == "stop"
    assert parsed(choice["message"]["content"])["age"] in (1, 2, 3)

"""LiteLLM, which speaks to a hundred providers, and to us as to OpenAI."""

from __future__ import annotations

import asyncio
import json

import litellm
import pytest

from nanovllm import SamplingParams

TALK = [{"role": "user", "content": "Tell me a story about a fox."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "find_child",
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["Tom", "Mia"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def options(url):
    where = dict(model="openai/nanovllm-tiny", api_base=f"{url}/v1", api_key="sesame")
    return dict(**where, messages=TALK, temperature=0, max_tokens=24, max_retries=0)


@pytest.fixture(scope="module")
def expected(offline):
    params = SamplingParams(temperature=0, max_tokens=24)
    return offline.chat(TALK, params, use_tqdm=False)[0]


def test_a_chat_is_that_of_the_offline_engine(options, expected):
    reply = litellm.completion(**options)
    assert reply.choices[0].message.content == expected["text"]
    assert reply.usage.completion_tokens == len(expected["token_ids"])


def test_a_stream_is_that_of_the_offline_engine(options, expected):
    chunks = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected["text"]
    assert chunks[-1].choices[0].finish_reason == expected["finish_reason"]

    async def ask() -> str:
        stream = await litellm.acompletion(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == expected["text"]


def test_a_completion_is_that_of_the_offline_engine(options, offline):
    where = {**options, "model": "text-completion-openai/nanovllm-tiny"}
    del where["messages"]
    reply = litellm.text_completion(prompt="Once upon a time", **where)
    params = SamplingParams(temperature=0, max_tokens=24)
    (wanted,) = offline.generate("Once upon a time", params, use_tqdm=False)
    assert reply.choices[0].text == wanted["text"]


def test_a_demanded_tool_is_called(options):
    asked = {**options, "max_tokens": 60}
    reply = litellm.completion(**asked, tools=[TOOL], tool_choice="required")
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "find_child"
    assert json.loads(call.function.arguments)["name"] in ("Tom", "Mia")
    assert reply.choices[0].finish_reason == "tool_calls"


def test_refusals_have_its_exceptions(options):
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**options, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**options, "model": "openai/another"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**options, "temperature": -1})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**{**options, "max_tokens": 10**6})

"""LangChain's ChatOpenAI and OpenAI."""

from __future__ import annotations

import asyncio

import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from nanovllm import SamplingParams

TALK = "Tell me a story about a fox."


class Child(BaseModel):
    """A child that is looked for."""

    is_old: bool


@pytest.fixture(scope="module")
def options(url):
    where = dict(model="nanovllm-tiny", base_url=f"{url}/v1", api_key="sesame")
    return dict(**where, temperature=0, max_tokens=24, max_retries=0)


@pytest.fixture(scope="module")
def expected(offline):
    params = SamplingParams(temperature=0, max_tokens=24)
    messages = [{"role": "user", "content": TALK}]
    return offline.chat(messages, params, use_tqdm=False)[0]


def test_a_chat_is_that_of_the_offline_engine(options, expected):
    chat = ChatOpenAI(**options)
    reply = chat.invoke(TALK)
    assert reply.content == expected["text"]
    assert reply.usage_metadata["output_tokens"] == len(expected["token_ids"])
    assert [answer.content for answer in chat.batch([TALK] * 3)] == [expected["text"]] * 3


def test_a_stream_is_that_of_the_offline_engine(options, expected):
    chat = ChatOpenAI(**options, stream_usage=True)
    chunks = list(chat.stream(TALK))
    whole = sum(chunks[1:], chunks[0])
    assert len(chunks) > 10 and whole.content == expected["text"]
    assert whole.usage_metadata["output_tokens"] == len(expected["token_ids"])

    async def ask() -> str:
        return "".join([chunk.content async for chunk in chat.astream(TALK)])

    assert asyncio.run(ask()) == expected["text"]


def test_a_completion_is_that_of_the_offline_engine(options, offline):
    params = SamplingParams(temperature=0, max_tokens=24)
    (wanted,) = offline.generate("Once upon a time", params, use_tqdm=False)
    assert OpenAI(**options).invoke("Once upon a time") == wanted["text"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_may_be_asked_for_as_an_object(options, method):
    chat = ChatOpenAI(**{**options, "max_tokens": 60})
    found = chat.with_structured_output(Child, method=method, strict=True).invoke(TALK)
    assert isinstance(found, Child)


def test_a_tools_result_goes_on_in_the_conversation(options):
    from langchain_core.messages import HumanMessage, ToolMessage

    chat = ChatOpenAI(**{**options, "max_tokens": 60})
    chat = chat.bind_tools([Child], tool_choice="Child", strict=True)
    asked = [HumanMessage(TALK)]
    called = chat.invoke(asked)
    (call,) = called.tool_calls
    result = ToolMessage("It is old.", tool_call_id=call["id"])
    reply = ChatOpenAI(**options).invoke([*asked, called, result])
    assert reply.content

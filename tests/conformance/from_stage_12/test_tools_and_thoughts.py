"""Thoughts and calls of tools, in the form in which Qwen3 writes them.

The bundled model calls no tools: here an engine's sampler reads a script, byte by byte, and the
text goes the whole way, from the engine's step to the `openai` package.
"""

from __future__ import annotations

import json
from random import Random

import openai
import pytest
from device import build
from openai.types.chat import ChatCompletion
from scripted import VOCAB, Script, save_scripted, tokens
from serving import parsed, served

from nanovllm.serve.parts import Splitter

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}t{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role[0] }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}c{{ call.function.name }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt and enable_thinking is defined %}<think>\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
ASK = [{"role": "user", "content": "ab"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa}ris", "n": {"a": 1}}}\n'
CALL += "</tool_call>"
OTHER = '<tool_call>\n{"arguments": {"x": [1, 2]}, "name": "add"}\n</tool_call>'
THOUGHT = "<think>\nOkay, <b> it is.\n</think>\n\n"
ARGUMENTS = {"city": "Pa}ris", "n": {"a": 1}}

# Text -> reasoning, content, calls.
TEXTS = {
    "plain": ("Hello <there>.", None, "Hello <there>.", []),
    "a thought": (THOUGHT + "Hello.", "Okay, <b> it is.", "Hello.", []),
    "an empty thought": ("<think>\n\n</think>\n\nHello.", None, "Hello.", []),
    "a thought without end": ("<think>\nHm, </thin", "Hm, </thin", "", []),
    "a call": (CALL, None, None, [("get_weather", ARGUMENTS)]),
    "words, a call": ("I look.\n" + CALL, None, "I look.", [("get_weather", ARGUMENTS)]),
    "all": (
        THOUGHT + "I look.\n\n" + CALL + "\n" + OTHER,
        "Okay, <b> it is.",
        "I look.",
        [("get_weather", ARGUMENTS), ("add", {"x": [1, 2]})],
    ),
    "two calls": (CALL + "\n" + CALL, None, None, [("get_weather", ARGUMENTS)] * 2),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', None, None, [("now", {})]),
    "no call": ("a <tool_call> b </tool_call> c", None, "a<tool_call> b </tool_call>c", []),
    "a call without end": (
        CALL[:60],
        None,
        None,
        [("get_weather", CALL[:60].partition('"arguments": ')[2])],
    ),
    "a name without end": ('ab\n<tool_call>\n{"na', None, 'ab<tool_call>\n{"na', []),
    "bytes": ("日本<tool_call>é</tool_call>", None, "日本<tool_call>é</tool_call>", []),
    "a thought later": ("Hello <think>\nno</think>", None, "Hello <think>\nno</think>", []),
}


def parts_of(text: str, cuts: list[int], **options: bool) -> list[tuple[str, str]]:
    """What a splitter makes of a text that comes in pieces, those of one kind joined."""
    splitter, joined = Splitter(**options), []
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    told = [part for piece in pieces for part in splitter.feed(piece)] + list(splitter.finish())
    for kind, said in told:
        assert said or kind == "call", "a part that says nothing"
        if joined and joined[-1][0] == kind and kind != "call":
            said = joined.pop()[1] + said
        joined.append((kind, said))
    return joined


@pytest.mark.parametrize("in_thought", [False, True])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_how_a_text_is_cut_does_not_change_its_parts(name, tools, in_thought):
    text, options = TEXTS[name][0], dict(tools=tools, in_thought=in_thought)
    whole, random = parts_of(text, [], **options), Random(name)
    assert parts_of(text, list(range(len(text))), **options) == whole
    for _ in range(100):
        cuts = sorted(random.sample(range(len(text) + 1), random.randrange(1, 9)))
        assert parts_of(text, cuts, **options) == whole, cuts


def test_no_mixture_of_tags_is_cut_in_another_way_or_fails():
    """Tags in any order, and halves of tags: each piece of text is in some part, once."""
    shreds = '<think>|</think>|<tool_call>|</tool_call>|<|</|think|\n| |a|}|{|"'.split("|")
    shreds += ['{"name": "f", "arguments": ', '{"a": 1}}']
    random = Random(0)
    for _ in range(1500):
        text = "".join(random.choices(shreds, k=random.randrange(1, 12)))
        options = dict(tools=random.random() < 0.8, in_thought=random.random() < 0.3)
        whole = parts_of(text, [], **options)
        assert parts_of(text, list(range(len(text))), **options) == whole, (text, options)


class Told(Script):
    """A script for prompts of any length: the request with seed s gets `lines[s]`, then its end."""

    def __init__(self, lines: dict[int, list[int]]):
        super().__init__(lines, 0)
        self.starts: dict[int, int] = {}

    def choose(self, logits, sampling, first: int = 0):
        asked = zip(sampling.seeds.tolist(), sampling.positions.tolist(), strict=True)
        found = [self.next_of(seed, position) for seed, position in asked]
        return logits.new_tensor(found).long()

    forward = choose

    def next_of(self, seed: int, position: int) -> int:
        start = self.starts.setdefault(seed, position)
        line = self.lines.get(seed, [])
        return line[position - start] if position - start < len(line) else VOCAB["xyz"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its chats end with the token "xyz"."""
    folder = save_scripted(tmp_path_factory.mktemp("scripted"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    llm = build(folder, dtype="float32", max_model_len=256, enforce_eager=True)
    with served(llm, served_model_name="scripted") as server:
        yield server
        server.settle()
    llm.exit()


@pytest.fixture
def say(server, monkeypatch):
    """`say(text, **body)`: the body of a chat whose answer will be this text."""

    def script(text: str, **body) -> dict:
        told = Told({5: tokens(text.encode())})
        monkeypatch.setattr(server.llm.model_runner, "sampler", told)
        asked = dict(messages=ASK, tools=[TOOL], seed=5, max_tokens=len(text.encode()) + 1)
        return {**asked, "stop_token_ids": [VOCAB["xyz"]], "stop": "xyz", **body}

    return script


def told_of(message: dict) -> tuple:
    """Reasoning, content and calls of a message."""
    calls = [
        (call["function"]["name"], as_told(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return message.get("reasoning_content"), message["content"], calls


def as_told(arguments: str) -> object:
    """A tool's arguments; as they are where they have no end."""
    try:
        return parsed(arguments)
    except ValueError:
        return arguments


def joined(told: list[dict]) -> tuple[dict, list[str | None]]:
    """The message that a stream's deltas come to, and the reasons."""
    message: dict = {"role": None, "content": ""}
    reasons = []
    for event in told:
        (choice,) = event["choices"]
        reasons.append(choice["finish_reason"])
        delta = choice["delta"]
        for name in ("role", "content", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", []):
            calls = message.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert call["id"].startswith("call_") and call["type"] == "function"
                calls.append({"id": call["id"], "function": dict(call["function"])})
            else:
                assert call["index"] == len(calls) - 1 and set(call) == {"index", "function"}
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    return message, reasons


@pytest.mark.parametrize("name", TEXTS)
def test_thoughts_and_calls_are_told_apart_whole_and_streamed(server, say, name):
    text, *expected = TEXTS[name]
    reply = server.post("/v1/chat/completions", say(text)).json()
    ChatCompletion.model_validate(reply, strict=True)
    (choice,) = reply["choices"]
    assert told_of(choice["message"]) == tuple(expected)
    ids = [call["id"] for call in choice["message"].get("tool_calls", [])]
    assert len(set(ids)) == len(expected[2])
    reason = "tool_calls" if expected[2] else "stop"
    assert choice["finish_reason"] == reason
    stream = server.post("/v1/chat/completions", say(text, stream=True)).text
    lines = stream.split("\n\n")[:-2]
    told = [parsed(line.removeprefix("data: ")) for line in lines]
    message, reasons = joined(told)
    reasoning, content, calls = told_of(message)
    assert (reasoning, content, calls) == (expected[0], expected[1] or "", expected[2])
    assert reasons[-1] == reason and set(reasons[:-1]) == {None}


def test_arguments_come_while_they_are_written(server, say):
    stream = server.post("/v1/chat/completions", say(CALL, stream=True)).text
    told = [parsed(line[6:]) for line in stream.split("\n\n")[:-2]]
    pieces = [
        call["function"]["arguments"]
        for event in told
        for call in event["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert len([piece for piece in pieces if piece]) > 10
    assert parsed("".join(pieces)) == ARGUMENTS


def test_the_openai_package_streams_a_call(server, say):
    """With its own way of joining a stream."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        body = say(THOUGHT + CALL)
        own = {"stop_token_ids": body.pop("stop_token_ids")}
        with client.chat.completions.stream(model="scripted", extra_body=own, **body) as stream:
            kinds = [event.type for event in stream]
            choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", ARGUMENTS)
    assert "tool_calls.function.arguments.delta" in kinds


def test_without_tools_a_call_is_text(server, say):
    for options in (dict(tools=None), dict(tool_choice="none")):
        reply = server.post("/v1/chat/completions", say(CALL, **options)).json()
        assert told_of(reply["choices"][0]["message"]) == (None, CALL, [])
        assert reply["choices"][0]["finish_reason"] == "stop"


def test_a_template_may_begin_the_thought(server, say):
    body = say("Hm.\n</think>\n\nYes.", chat_template_kwargs={"enable_thinking": True})
    reply = server.post("/v1/chat/completions", body).json()
    assert told_of(reply["choices"][0]["message"]) == ("Hm.", "Yes.", [])


def test_a_tools_result_goes_on_in_the_conversation(server, say):
    """As the package sends it: an assistant's message that has calls need not say anything."""
    function = {"name": "get_weather", "arguments": "{}"}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}
    called["tool_calls"][0]["function"] = function
    result = {"role": "tool", "tool_call_id": "1", "content": "ab"}
    for content in ({}, {"content": None}, {"content": ""}):
        messages = [*ASK, {**called, **content}, result]
        tokenized = server.post("/tokenize", {"messages": messages})
        assert tokenized.status_code == 200, tokenized.text
        text = server.post("/detokenize", {"tokens": tokenized.json()["tokens"]}).json()["prompt"]
        assert "None" not in text and "cget_weather" in text
        reply = server.post("/v1/chat/completions", say("ab", messages=messages))
        assert reply.json()["choices"][0]["message"]["content"] == "ab"


FUNCTION = {
    "name": "find_child",
    "parameters": {
        "type": "object",
        "properties": {"name": {"enum": ["Tom", "Mia"]}, "age": {"type": "integer", "maximum": 9}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}
NAMED = {"type": "function", "function": {"name": "find_child"}}
TOOLS = [TOOL, {"type": "function", "function": FUNCTION}]


@pytest.fixture(scope="module")
def bundled_server():
    llm = build(dtype="float32", max_model_len=256)
    with served(llm) as server:
        yield server
        server.settle()
    llm.exit()


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["any", "named"])
def test_a_demanded_call_is_made_by_any_model(bundled_server, choice, temperature):
    """A grammar holds the bundled model to it, which has never seen a tool."""
    options = dict(base_url=f"{bundled_server.url}/v1", api_key="any", max_retries=0)
    tools = TOOLS if isinstance(choice, dict) else TOOLS[1:]
    asked = dict(model="nanovllm-tiny", messages=ASK, tools=tools, tool_choice=choice)
    with openai.OpenAI(**options) as client:
        reply = client.chat.completions.create(
            **asked, max_tokens=90, temperature=temperature, seed=2
        )
    (chosen,) = reply.choices
    assert chosen.finish_reason == "tool_calls"
    (call,) = chosen.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "find_child" and set(arguments) == {"name", "age"}
    assert arguments["name"] in ("Tom", "Mia") and arguments["age"] <= 9


@pytest.mark.parametrize(
    "wrong",
    [
        dict(tool_choice="required"),
        dict(tool_choice="required", tools=[]),
        dict(tool_choice="sometimes", tools=TOOLS),
        dict(tool_choice={"type": "function", "function": {"name": "g"}}, tools=TOOLS),
        dict(tool_choice={"type": "function"}, tools=TOOLS),
        dict(tool_choice="required", tools=[{"type": "function"}]),
        dict(tool_choice="required", tools=[{"function": {"name": 3, "parameters": 4}}]),
    ],
    ids=str,
)
def test_a_demand_that_cannot_be_kept_is_refused(bundled_server, wrong):
    body = {"messages": ASK, "max_tokens": 9, **wrong}
    reply = bundled_server.post("/v1/chat/completions", body)
    assert reply.status_code == 400, reply.text
    assert "tool_choice" in reply.text or "grammar" in reply.text

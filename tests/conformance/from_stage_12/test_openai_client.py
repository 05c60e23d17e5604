"""The `openai` package as it is, before our server: what it gets is what the offline engine says.

Each reply is checked against the package's own types, strictly, as it came over the wire.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from device import build
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from serving import PATIENCE_S, parsed, served

from nanovllm import SamplingParams
from nanovllm.serve.replies import chat_logprobs, completion_logprobs

NAME = "nanovllm-tiny"
PROMPT = "Once upon a time"
TALK = [{"role": "user", "content": "Tell me a story about a fox."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 2, 3]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GREEDY = dict(temperature=0, max_tokens=20)


@pytest.fixture(scope="module")
def server():
    llm = build(dtype="float32", num_kvcache_blocks=300, kvcache_block_size=16)
    with served(llm, max_open=150) as server:
        yield server
        server.settle()
    llm.exit()


def is_right(kind: type, reply: dict, is_chunk: bool = False) -> dict:
    """A reply that is of one of the package's types, strictly; a mistake is an error.

    In two places the API says null, and the types of completions don't know: nothing stands before
    a prompt's first token, and all chunks of a stream but the last come without a reason.
    """
    told = json.loads(json.dumps(reply))
    if kind is Completion:
        for choice in told["choices"]:
            if is_chunk and choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
            for name in ("token_logprobs", "top_logprobs"):
                column = (choice["logprobs"] or {}).get(name)
                if column and column[0] is None:
                    column[0] = 0.0 if name == "token_logprobs" else {}
    kind.model_validate(told, strict=True)
    return reply


def check_wire(response: httpx.Response) -> None:
    """Each reply on its way to the package."""
    if response.status_code != 200:
        return
    path, body = response.request.url.path, json.loads(response.request.content or b"{}")
    if body.get("stream") or not path.endswith("completions"):
        return
    response.read()
    is_right(ChatCompletion if "chat" in path else Completion, parsed(response.content))


@pytest.fixture(scope="module")
def client(server):
    http = httpx.Client(event_hooks={"response": [check_wire]}, trust_env=False, timeout=PATIENCE_S)
    options = dict(api_key="any", base_url=f"{server.url}/v1", max_retries=0)
    with openai.OpenAI(**options, http_client=http) as client:
        yield client


def stream_of(server, path: str, body: dict) -> list[dict]:
    """A stream's events as they came, each of the package's type; [DONE] is the last."""
    reply = server.post(path, {**body, "stream": True})
    assert reply.status_code == 200 and reply.headers["content-type"].startswith(
        "text/event-stream"
    )
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    kind = ChatCompletionChunk if "chat" in path else Completion
    return [is_right(kind, parsed(line.removeprefix("data: ")), True) for line in lines[:-2]]


def said(offline, prompts, **options) -> list[dict]:
    return offline.generate(prompts, SamplingParams(**options), use_tqdm=False)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == NAME and model.owned_by == "nanovllm"
    Model.model_validate(model.model_dump(), strict=True)
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_a_chat_says_what_the_offline_engine_says(client, offline):
    reply = client.chat.completions.create(model=NAME, messages=TALK, **GREEDY)
    (expected,) = offline.chat(TALK, SamplingParams(**GREEDY), use_tqdm=False)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected["text"])
    assert choice.finish_reason == expected["finish_reason"]
    assert choice.logprobs is None and choice.message.tool_calls is None
    assert reply.model == NAME and reply.id.startswith("chatcmpl-")
    num_prompt = len(offline.apply_chat_template(TALK))
    assert reply.usage.prompt_tokens == num_prompt
    assert reply.usage.completion_tokens == len(expected["token_ids"])
    assert reply.usage.total_tokens == num_prompt + len(expected["token_ids"])


def test_the_async_client_gets_the_same_from_many_calls_at_once(server, offline):
    prompts = [f"{PROMPT}, {i} cats" for i in range(20)]

    async def ask_all() -> list[str]:
        options = dict(api_key="any", base_url=f"{server.url}/v1", max_retries=0)
        async with openai.AsyncOpenAI(**options) as client:

            async def ask(prompt: str) -> str:
                text = ""
                stream = await client.completions.create(
                    model=NAME, prompt=prompt, stream=True, **GREEDY
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*map(ask, prompts))

    expected = [output["text"] for output in said(offline, prompts, **GREEDY)]
    assert asyncio.run(ask_all()) == expected


@pytest.mark.parametrize("n", [1, 3])
def test_a_chats_stream_has_the_form_of_the_api(server, client, n):
    """The role first, one id, one reason at the end, and the usage where it was asked for."""
    body = dict(messages=TALK, n=n, temperature=1, seed=5, max_tokens=12)
    whole = client.chat.completions.create(model=NAME, **body)
    usage = {"include_usage": True}
    told = stream_of(server, "/v1/chat/completions", {**body, "stream_options": usage})
    assert len({(event["id"], event["created"], event["model"]) for event in told}) == 1
    assert told[-1]["choices"] == [] and all(event["usage"] is None for event in told[:-1])
    counts = whole.usage.model_dump(exclude={"prompt_tokens_details"}, exclude_none=True)
    assert {name: told[-1]["usage"][name] for name in counts} == counts
    for i in range(n):
        choices = [event["choices"][0] for event in told[:-1] if event["choices"][0]["index"] == i]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in choices[1:])
        reasons = [choice["finish_reason"] for choice in choices]
        assert set(reasons[:-1]) == {None} and reasons[-1] == whole.choices[i].finish_reason
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole.choices[i].message.content
        assert all(choice["delta"] for choice in choices[:-1]), "a chunk that says nothing"
    plain = stream_of(server, "/v1/chat/completions", body)
    assert all("usage" not in event and event["choices"] for event in plain)


def test_characters_of_many_bytes_come_whole(server, client, offline):
    """Tokens of single bytes, forced by a bias: no event holds half of a character."""
    tokenizer, text = offline.tokenizer, "日本 é"
    ids = [token for character in text for token in offline.encode(character)]
    assert len(ids) > len(text), "the vocabulary has these characters, so it is no test"
    grammar = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": text}}}
    body = dict(messages=TALK, temperature=0, max_tokens=40, response_format=grammar)
    told = stream_of(server, "/v1/chat/completions", {**body, "logprobs": True})
    contents = [choice["delta"].get("content", "") for e in told for choice in e["choices"]]
    assert json.loads("".join(contents)) == text
    assert not any("\ufffd" in content for content in contents)
    scores = [
        score
        for event in told
        for choice in event["choices"]
        for score in (choice["logprobs"] or {"content": []})["content"]
    ]
    data = b"".join(bytes(s["bytes"]) for s in scores).replace(tokenizer.eos_token.encode(), b"")
    assert json.loads(data.decode()) == text
    assert any(len(s["bytes"]) == 1 and s["bytes"][0] > 127 for s in scores), "none was cut"


def test_answers_with_a_seed_come_again_and_differ_among_n(client, offline):
    body = dict(model=NAME, prompt=PROMPT, temperature=1, seed=3, max_tokens=15)
    first, again = (client.completions.create(**body, n=4) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 4
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    (expected,) = said(offline, PROMPT, temperature=1, seed=3, max_tokens=15)
    assert texts[0] == expected["text"] == client.completions.create(**body).choices[0].text
    num_prompt = len(offline.encode(PROMPT))
    assert first.usage.prompt_tokens == num_prompt, "a prompt counts once"


def test_a_stop_string_ends_a_text_before_it(client, server, offline):
    (whole,) = said(offline, PROMPT, **GREEDY)
    stop = whole["text"][12:15]
    expected = whole["text"][: whole["text"].index(stop)]
    for asked in (stop, [stop], ["zzz", stop]):
        reply = client.completions.create(model=NAME, prompt=PROMPT, stop=asked, **GREEDY)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
        told = stream_of(server, "/v1/completions", dict(prompt=PROMPT, stop=asked, **GREEDY))
        assert "".join(event["choices"][0]["text"] for event in told) == expected


@pytest.mark.parametrize("kind", ["text", "token ids"])
def test_lists_of_prompts_are_answered_in_their_order(client, server, offline, kind):
    texts = [PROMPT, "The cat", "A big dog and a small"]
    prompts = texts if kind == "text" else [offline.encode(text) for text in texts]
    expected = [output["text"] for output in said(offline, texts, **GREEDY)]
    reply = client.completions.create(model=NAME, prompt=prompts, **GREEDY)
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.prompt_tokens == sum(map(len, map(offline.encode, texts)))
    told = stream_of(server, "/v1/completions", dict(prompt=prompts, **GREEDY))
    for i, text in enumerate(expected):
        choices = [event["choices"][0] for event in told if event["choices"][0]["index"] == i]
        assert "".join(choice["text"] for choice in choices) == text
    alone = client.completions.create(model=NAME, prompt=prompts[0], **GREEDY)
    assert alone.choices[0].text == expected[0]


def test_a_chats_log_probabilities_are_the_engines(client, server, offline):
    body = dict(messages=TALK, logprobs=True, top_logprobs=3, **GREEDY)
    reply = client.chat.completions.create(model=NAME, **body)
    params = SamplingParams(**GREEDY, logprobs=3)
    (expected,) = offline.chat(TALK, params, use_tqdm=False)
    content = reply.choices[0].logprobs.content
    assert len(content) == len(expected["token_ids"])
    for score, token_id, told in zip(content, expected["token_ids"], expected["logprobs"]):
        assert score.logprob == pytest.approx(told[token_id], abs=1e-3)
        likely = sorted(told.values(), reverse=True)[:3]
        assert [top.logprob for top in score.top_logprobs] == pytest.approx(likely, abs=1e-3)
        assert bytes(score.bytes).decode() == score.token == offline.tokenizer.decode([token_id])
        assert score.token in [top.token for top in score.top_logprobs], "greedy: the likeliest"
    text = "".join(score.token for score in content)
    assert text.removesuffix("<|im_end|>") == expected["text"]
    streamed = [
        score
        for event in stream_of(server, "/v1/chat/completions", body)
        for choice in event["choices"]
        for score in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert [s["token"] for s in streamed] == [score.token for score in content]
    alone = client.chat.completions.create(
        model=NAME, messages=TALK, logprobs=True, max_tokens=2, temperature=0
    )
    assert [score.top_logprobs for score in alone.choices[0].logprobs.content] == [[], []]


@pytest.mark.parametrize("max_tokens", [0, 6])
def test_an_echo_tells_the_prompt_and_how_likely_it_was(client, offline, max_tokens):
    reply = client.completions.create(
        model=NAME, prompt=PROMPT, echo=True, logprobs=2, max_tokens=max_tokens, temperature=0
    )
    params = dict(temperature=0, logprobs=2, prompt_logprobs=2, max_tokens=max(max_tokens, 1))
    (expected,) = said(offline, PROMPT, **params)
    ids = offline.encode(PROMPT) + expected["token_ids"][:max_tokens]
    told = [None, *expected["prompt_logprobs"][1:], *expected["logprobs"][:max_tokens]]
    (choice,) = reply.choices
    assert choice.text == PROMPT + (expected["text"] if max_tokens else "")
    logprobs = choice.logprobs
    assert logprobs.tokens == [offline.tokenizer.decode([token]) for token in ids]
    assert "".join(logprobs.tokens) == choice.text
    for token, text, offset in zip(ids, logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(text)] == text, token
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    for i in range(1, len(ids)):
        assert logprobs.token_logprobs[i] == pytest.approx(told[i][ids[i]], abs=1e-3)
        likely = sorted(told[i].values(), reverse=True)[:2]
        found = sorted(logprobs.top_logprobs[i].values(), reverse=True)[:2]
        assert found == pytest.approx(likely, abs=1e-3)
    assert reply.usage.completion_tokens == max_tokens and choice.finish_reason == "length"


def test_an_echo_is_streamed_first(server, offline):
    (expected,) = said(offline, PROMPT, **GREEDY)
    told = stream_of(server, "/v1/completions", dict(prompt=PROMPT, echo=True, **GREEDY))
    texts = [event["choices"][0]["text"] for event in told]
    assert texts[0] == PROMPT and "".join(texts[1:]) == expected["text"]


def test_tokens_that_read_the_same_do_not_hide_each_other(offline):
    """Single bytes that are no characters: of two such, the likelier one's is the text's."""
    ids = (i for i in range(256) if offline.tokenizer.decode([i]) == "\ufffd")
    low, high, other = next(ids), next(ids), offline.encode("a")[0]
    scores = {low: -3.0, high: -1.0, other: -2.0}
    told = completion_logprobs(offline.tokenizer, [scores], 3, 0)
    assert told["token_logprobs"] == [-3.0]
    assert told["top_logprobs"] == [{"\ufffd": -1.0, "a": -2.0}]


def test_what_is_impossible_has_a_number_that_json_has(offline):
    """Minus infinity has none."""
    scores = {300: -float("inf"), 301: -float("inf")}
    told = completion_logprobs(offline.tokenizer, [scores], 2, 0)
    assert told["token_logprobs"] == [-9999.0]
    assert set(told["top_logprobs"][0].values()) == {-9999.0}
    told = chat_logprobs(offline.tokenizer, [scores], 2)
    assert [score["logprob"] for score in told["content"][0]["top_logprobs"]] == [-9999.0] * 2


def test_a_prompt_that_is_cached_is_told_in_the_usage(server, client):
    prompt = list(range(300, 350))
    for cached in (0, 48):
        reply = client.completions.create(model=NAME, prompt=prompt, max_tokens=2)
        assert reply.usage.prompt_tokens_details.cached_tokens == cached
        assert reply.usage.prompt_tokens == 50
    body = dict(prompt=prompt, max_tokens=2, stream_options={"include_usage": True})
    told = stream_of(server, "/v1/completions", body)
    assert told[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 48}
    new = list(range(400, 450))
    reply = client.completions.create(model=NAME, prompt=[prompt, new], max_tokens=2, n=3)
    assert reply.usage.prompt_tokens_details.cached_tokens == 48, "what other answers found is none"
    assert reply.usage.prompt_tokens == 100


def test_sampling_options_reach_the_engine(client, offline):
    """Those of the API, and the engine's own in `extra_body`."""
    known = dict(temperature=0.9, top_p=0.8, seed=9, max_tokens=20)
    known |= dict(presence_penalty=0.5, frequency_penalty=0.7)
    own = dict(top_k=9, min_p=0.05, repetition_penalty=1.3, ignore_eos=True, stop_token_ids=[40])
    (expected,) = said(offline, PROMPT, **known, **own)
    reply = client.completions.create(model=NAME, prompt=PROMPT, **known, extra_body=own)
    assert reply.choices[0].text == expected["text"]
    (biased,) = said(offline, PROMPT, **GREEDY, logit_bias={400: 100.0})
    reply = client.completions.create(model=NAME, prompt=PROMPT, **GREEDY, logit_bias={"400": 100})
    assert reply.choices[0].text == biased["text"]
    default = client.chat.completions.create(
        model=NAME, messages=TALK, max_completion_tokens=3, temperature=0, max_tokens=50
    )
    assert default.usage.completion_tokens == 3


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_an_answer_follows_its_json_schema(client, server, seed):
    form = {"type": "json_schema", "json_schema": {"name": "child", "schema": SCHEMA}}
    body = dict(messages=TALK, response_format=form, max_tokens=80)
    body |= dict(temperature=0) if seed is None else dict(temperature=1.5, seed=seed)
    reply = client.chat.completions.create(model=NAME, **body)
    child = parsed(reply.choices[0].message.content)
    assert reply.choices[0].finish_reason == "stop"
    assert set(child) == {"name", "age"} and child["age"] in (1, 2, 3)
    assert len(child["name"]) <= 8
    told = stream_of(server, "/v1/chat/completions", body)
    contents = [choice["delta"].get("content", "") for e in told for choice in e["choices"]]
    assert "".join(contents) == reply.choices[0].message.content


def test_the_packages_own_models_are_parsed(client):
    """`parse` makes the schema from a class, and the class from the answer."""
    from pydantic import BaseModel

    class Child(BaseModel):
        is_old: bool

    reply = client.chat.completions.parse(
        model=NAME, messages=TALK, response_format=Child, max_tokens=40, temperature=0
    )
    assert isinstance(reply.choices[0].message.parsed, Child)


def test_any_json_may_be_asked_for(client):
    form = {"type": "json_object"}
    reply = client.chat.completions.create(
        model=NAME, messages=TALK, response_format=form, max_tokens=200, temperature=0
    )
    content, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert content.startswith("{")
    assert reason == "length" or isinstance(parsed(content), dict)


# What is wrong, and who is told how.

WRONG = {
    "temperature": dict(temperature=-1),
    "top_p": dict(top_p=0),
    "max_tokens": dict(max_tokens=-1),
    "n": dict(n=0),
    "seed": dict(seed=10**30),
    "stop": dict(stop=["a"] * 20),
    "presence_penalty": dict(presence_penalty=3),
    "logit_bias": dict(logit_bias={"4000": 1}),
    "logprobs": dict(logprobs=21),
    "prompt": dict(prompt=[]),
    "temprature": dict(extra_body={"temprature": 1}),
    "best_of": dict(best_of=3),
    "suffix": dict(suffix="b"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_misfit_is_a_bad_request_that_names_its_parameter(client, name):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": NAME, "prompt": PROMPT, **WRONG[name]})
    error = caught.value
    assert (error.status_code, error.type, error.param) == (400, "invalid_request_error", name)
    assert name in error.body["message"]


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("top_logprobs", dict(top_logprobs=3)),
        ("top_logprobs", dict(logprobs=True, top_logprobs=21)),
        ("messages", dict(messages=[])),
        ("messages", dict(messages=[{"role": "user"}])),
        ("messages", dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}])),
        ("tools", dict(tools="hammer")),
        ("tool_choice", dict(tool_choice="sometimes")),
        ("response_format", dict(response_format={"type": "xml"})),
        ("response_format", dict(response_format={"type": "json_schema"})),
    ],
    ids=str,
)
def test_a_chats_misfit_is_a_bad_request_that_names_its_parameter(client, name, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": TALK, **wrong})
    assert caught.value.type == "invalid_request_error"
    assert (caught.value.param or "").startswith(name), caught.value.body


def test_what_does_not_fit_the_model_has_the_code_for_it(client):
    for wrong in (dict(prompt="word " * 9000), dict(prompt=PROMPT, max_tokens=10**9)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=NAME, **wrong)
        assert caught.value.code == "context_length_exceeded"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt=PROMPT)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_refusals_have_the_packages_exceptions(server):
    """401, 413, 429 and 500."""

    def kind_of(served_at, key="right", **body) -> openai.APIStatusError:
        options = dict(api_key=key, base_url=f"{served_at.url}/v1", max_retries=0)
        with openai.OpenAI(**options) as client, pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**{"model": NAME, "prompt": PROMPT, **body})
        return caught.value

    options = dict(api_key="right", max_open=2, max_body_bytes=5000)
    with served(server.llm, **options) as other:
        error = kind_of(other, key="wrong")
        assert isinstance(error, openai.AuthenticationError)
        assert error.code == "invalid_api_key"
        error = kind_of(other, prompt="a" * 6000)
        assert (error.status_code, error.code) == (413, "body_too_large")
        with openai.OpenAI(api_key="right", base_url=f"{other.url}/v1") as client:
            asked = dict(prompt=PROMPT, n=2, max_tokens=300, stream=True)
            with client.completions.create(
                model=NAME, **asked, extra_body={"ignore_eos": True}
            ) as running:
                next(iter(running))
                error = kind_of(other)
        assert isinstance(error, openai.RateLimitError) and error.type == "rate_limit_error"
        assert error.code == "too_many_requests"
        other.settle()
        with pytest.MonkeyPatch.context() as patch:

            def broken(*rest):
                raise RuntimeError("no memory")

            patch.setattr(server.llm.model_runner, "run", broken)
            error = kind_of(other)
        assert isinstance(error, openai.InternalServerError) and error.type == "server_error"

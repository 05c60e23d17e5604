"""Requests that nobody should send: each gets an answer in JSON, and the next one is served."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from random import Random

import pytest
from device import build
from serving import events, parsed, raw, request_bytes, served, text_of

NUM_BODIES = int(os.environ.get("NANOVLLM_BODIES", 150))
JSON = "Content-Type: application/json\r\n"
GOOD = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
PATHS = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"


@pytest.fixture(scope="module")
def server():
    llm = build(dtype="float32", max_model_len=96, kvcache_block_size=16, num_kvcache_blocks=300)
    with served(llm) as server:
        server.good = server.post("/v1/completions", GOOD).json()["choices"]
        yield server
    llm.exit()


@pytest.fixture(autouse=True)
def as_good_as_before(server):
    """Whatever a test has sent, the engine is empty, and says what it has said before."""
    yield
    server.settle()
    assert server.post("/v1/completions", GOOD).json()["choices"] == server.good
    assert server.http.get("/health").status_code == 200


def check(reply, *statuses: int) -> dict:
    """A refusal in the API's form, that tells nothing of the server's inside."""
    assert reply.status_code in statuses, (reply.status_code, reply.text[:500])
    assert "Traceback" not in reply.text and 'File "' not in reply.text
    error = parsed(reply.text)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def send(server, path: str, body: str | bytes, kind: str = "application/json"):
    return server.http.post(path, content=body, headers={"Content-Type": kind})


# Bytes that are no HTTP, or hardly.

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(GOOD).encode()
MALFORMED = {
    "no line": b"\r\n\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x80" * 200,
    "no version": b"GET /health\r\n\r\n",
    "another version": b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path out": b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long path": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an unknown method": b"FROB /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "headers without end": HEAD + b"X-A: b\r\n" * 50,
    "a huge header": HEAD + b"X-A: " + b"b" * 1_000_000 + b"\r\n\r\n",
    "many headers": HEAD + b"X-A: b\r\n" * 50_000 + b"\r\n",
    "no colon": HEAD + b"nonsense\r\n\r\n",
    "a NUL in a header": HEAD + b"X-A: \x00\r\n\r\n",
    "a length that is none": HEAD + b"Content-Length: ten\r\n\r\n" + BODY,
    "a negative length": HEAD + b"Content-Length: -5\r\n\r\n" + BODY,
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n" + BODY,
    "a huge length": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
    "length and chunks": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk's size that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n",
    "a huge chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\nab",
    "a chunk without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n",
    "an unknown coding": HEAD + b"Transfer-Encoding: gzip, br\r\n\r\n" + BODY,
    "an upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_gets_no_failure_of_the_servers(server, name):
    """It is refused, or served as what it is after all, or the connection ends."""
    said = raw(server.port, MALFORMED[name], patience_s=0.5, close=True)
    for status in re.findall(rb"HTTP/1.[01] (\d+)", said):
        assert status < b"500", said[:300]
    assert b"Traceback" not in said and b"root:" not in said


@pytest.mark.parametrize("cut", [1, 60, len(HEAD), len(HEAD) + 30, -1])
def test_a_request_that_is_never_finished_is_forgotten(server, cut):
    whole = request_bytes("/v1/completions", GOOD)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(whole[:cut])
        assert server.post("/v1/completions", GOOD).json()["choices"] == server.good
    said = raw(server.port, whole[:cut], patience_s=2, close=True)
    assert b" 200 " not in said and b" 500 " not in said


def test_requests_in_one_breath_are_answered_in_their_order(server):
    asked = [{**GOOD, "max_tokens": n} for n in (3, 1, 2)]
    data = b"".join(request_bytes("/v1/completions", body) for body in asked)
    data = data.replace(b"Connection: close\r\n", b"", 2)
    said = raw(server.port, data)
    counts = re.findall(rb'"completion_tokens": (\d+)', said)
    assert counts == [b"3", b"1", b"2"] and said.count(b"HTTP/1.1 200") == 3


def test_a_caller_that_says_it_will_send_no_more_may_still_read_or_has_left(server):
    """A half-closed connection: it is served, or taken as one that left. Nothing stays."""
    said = raw(server.port, request_bytes("/v1/completions", GOOD), close=True)
    assert said == b"" or b" 200 " in said


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE"])
def test_another_method_is_refused(server, path, method):
    check(server.http.request(method, path), 405)


def test_what_is_not_there_is_not_found(server):
    for path in ("/v1", "/v1/", "/v2/models", "/docs", "/redoc", "/static/../../pyproject.toml"):
        check(server.http.get(path), 404)


# Bodies that are no JSON, or JSON that is nothing.

BODIES = {
    "nothing": b"",
    "half": BODY[:-3],
    "two": BODY + BODY,
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "Latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "a NUL": b"\x00" * 100,
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a deep prompt": b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}",
    "a deep message": b'{"messages":[' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"]}",
    "a number of a million digits": b'{"prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}",
    "a number of 4,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 4_000 + b"}",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"prompt"',
    "a number": b"1e5",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_a_mistake_of_the_caller(server, name):
    for path in PATHS:
        check(send(server, path, BODIES[name]), 400)


def test_a_body_of_another_kind_is_no_failure(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense", "a/b; charset=x"):
        reply = send(server, "/v1/completions", BODY, kind)
        assert reply.status_code == 200 or check(reply, 400, 415)


# Values that fit nowhere.

ODD = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1",
        "0",
        "-0.0",
        "1e-320",
        str(2**63),
        str(10**40),
    ),
    *("null", "true", "[]", "{}", '""', '"x"', '"\\ud800"', '"\\u0000"', "[null]", '["\\udfff"]'),
    *('{"\\ud800": 1}', '{"a": NaN}', "[1, [2]]", "[[]]", "[-1]", "[1536]", f"[{10**30}]", "[1.5]"),
    *('[{"a": {"b": [1]}}]', "[true]", '{"type": "json_object"}', '{"type": "json_schema"}'),
)
FIELDS = {
    "/v1/completions": "prompt max_tokens logprobs echo best_of suffix",
    "/v1/chat/completions": "messages max_tokens max_completion_tokens logprobs top_logprobs "
    "response_format tools tool_choice parallel_tool_calls chat_template_kwargs reasoning_effort "
    "modalities",
    "/tokenize": "prompt messages chat_template_kwargs",
    "/detokenize": "tokens",
}
COMMON = (
    "model stream stream_options n temperature top_p seed stop presence_penalty frequency_penalty "
    "logit_bias top_k min_p repetition_penalty ignore_eos stop_token_ids user metadata store "
    "service_tier safety_identifier prompt_cache_key unheard_of"
)
SOUND = {PATHS[0]: GOOD, PATHS[1]: CHAT, PATHS[2]: {"prompt": "a"}, PATHS[3]: {"tokens": [5]}}


def odd_body(path: str, changed: dict[str, str]) -> str:
    """A sound body with some fields, written as given."""
    whole = {name: json.dumps(value) for name, value in SOUND[path].items()} | changed
    return "{" + ", ".join(f'"{name}": {value}' for name, value in whole.items()) + "}"


def check_served_or_refused(reply, body: str) -> None:
    assert reply.status_code in (200, 400, 404, 429), (body, reply.status_code, reply.text[:500])
    if reply.status_code != 200:
        check(reply, reply.status_code)
    elif reply.headers["content-type"] == "application/json":
        parsed(reply.text)
    else:
        assert reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text, body


@pytest.mark.parametrize("path", PATHS)
def test_no_value_of_any_field_is_a_failure_of_the_servers(server, path):
    names = FIELDS[path].split() + (COMMON.split() if path == PATHS[0] else ["model"])
    for name in names:
        for value in ODD:
            body = odd_body(path, {name: value})
            check_served_or_refused(send(server, path, body), body)


@pytest.mark.parametrize("path", PATHS[:2])
def test_no_mixture_of_odd_values_is_a_failure_of_the_servers(server, path):
    random, names = Random(path), FIELDS[path].split() + COMMON.split()[:-1]
    kept = (*ODD, "1", "2", "0.5", '{"5": -100, "6": 100}', '["a", "b"]', "[5, 6]", '{"a": 1}')
    for _ in range(NUM_BODIES):
        some = random.sample(names, random.choice([1, 2, 3]))
        body = odd_body(path, {name: random.choice(kept) for name in some})
        check_served_or_refused(send(server, path, body), body)


TEXTS = "\ud800", "a\x00b", "\U0010ffff", "é" * 500, "<|im_end|>"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_no_text_anywhere_is_a_failure_of_the_servers(server, text):
    """Half characters can't be encoded: what needs to is refused, and what does not is served."""
    message = {"role": "user", "content": text}
    tool = {"type": "function", "function": {"name": text, "parameters": {"title": text}}}
    schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
    form = {"type": "json_schema", "json_schema": {"name": text, "schema": schema}}
    parts = [{"type": "text", "text": text}]
    for path, changed in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [text, text]}),
        ("/v1/completions", {"model": text}),
        ("/v1/completions", {"stop": text}),
        ("/v1/completions", {"stop": ["a", text], "stream": True}),
        ("/v1/completions", {"suffix": text}),
        ("/v1/completions", {"logit_bias": {text: 1}}),
        ("/v1/completions", {text: 1}),
        ("/v1/completions", {"user": text, "metadata": {text: text}}),
        ("/v1/chat/completions", {"messages": [message]}),
        ("/v1/chat/completions", {"messages": [{"role": text, "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{**message, "name": text, text: text}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}),
        ("/v1/chat/completions", {"tools": [tool]}),
        ("/v1/chat/completions", {"tools": [tool], "tool_choice": text}),
        ("/v1/chat/completions", {"response_format": form, "max_tokens": 30}),
        ("/v1/chat/completions", {"response_format": {"type": text}}),
        ("/v1/chat/completions", {"chat_template_kwargs": {text: text}}),
        ("/tokenize", {"prompt": text}),
        ("/tokenize", {"messages": [message], "prompt": None}),
    ):
        body = json.dumps({**SOUND[path], **changed})
        check_served_or_refused(send(server, path, body), body)


# What would take for ever.

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
COSTLY_SCHEMAS = {
    "not a type": {"type": "nonsense"},
    "a reference to itself": {"$ref": "#"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to a host": {"$ref": "http://127.0.0.1:9/schema"},
    "a huge pattern": {"type": "string", "pattern": "^((((a{1,99}){1,99}){1,99}){1,99}){1,99}$"},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "a huge length": {"type": "string", "minLength": 10**9, "maxLength": 10**12},
    "many items": {"type": "array", "items": {"enum": [1]}, "minItems": 10**8},
    "many unions": {"anyOf": [{"type": "string", "pattern": f"{i}.*{i}"} for i in range(500)]},
    "many names": {"properties": {f"p{i}": {} for i in range(3000)}},
    "deep": json.loads('{"items":' * 200 + "{}" + "}" * 200),
}


@pytest.mark.parametrize(
    "options",
    [{"chat_template": ENDLESS}, {"tokenizer_kwargs": {}}, {"tokenize": True}, {"tools": 1}],
    ids=str,
)
def test_a_request_brings_no_program_of_its_own(server, options):
    """A template is a program, which may run for ever: only the checkpoint's is run."""
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"messages": CHAT["messages"]}),
    ):
        error = check(server.post(path, {**body, "chat_template_kwargs": options}), 400)
        assert next(iter(options)) in error["message"]


@pytest.mark.parametrize("name", COSTLY_SCHEMAS)
def test_a_costly_schema_is_served_or_refused_and_holds_nobody_up(server, name):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": COSTLY_SCHEMAS[name]}}
    reply = server.post("/v1/chat/completions", {**CHAT, "response_format": form}, timeout=20)
    assert reply.status_code == 200 or check(reply, 400)


def test_all_a_stream_says_is_json_though_tokens_are_impossible(server):
    """A bias of -100 or a grammar leaves tokens without any probability: minus infinity."""
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = {**CHAT, "response_format": form, "logprobs": True, "top_logprobs": 20}
    parsed(server.post("/v1/chat/completions", {**asked, "max_tokens": 20}).text)
    biased = {**GOOD, "logit_bias": {str(i): -100 for i in range(1535)}, "logprobs": 20}
    parsed(server.post("/v1/completions", {**biased, "echo": True}).text)
    told = asyncio.run(events(server.port, "/v1/completions", biased))
    assert len(text_of(told)) > 0

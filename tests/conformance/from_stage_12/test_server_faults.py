"""Callers that leave, stall, ask for too much, and an engine that dies: the others lose nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from device import DEVICE, build
from serving import (
    Command,
    events,
    is_running,
    raw,
    request_bytes,
    served,
    text_of,
    until,
)

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.serve.client import Answer

NUM_LEAVING = int(os.environ.get("NANOVLLM_LEAVING", 300))
WORDS = "cat dog fox sun moon tree boat girl boy king red old big sad hill sea".split()
GREEDY = dict(temperature=0, ignore_eos=True)


def prompt(number: int) -> str:
    """Another one for each number."""
    a, b = divmod(number, len(WORDS))
    return f"Once upon a time, a {WORDS[b]} and a {WORDS[a % len(WORDS)]} met a"


@pytest.fixture(scope="module")
def server():
    llm = build(dtype="float32", num_kvcache_blocks=600, kvcache_block_size=16)
    with served(llm) as server:
        yield server
    llm.exit()


def expected(offline, prompts: list[str], num_tokens: int) -> list[str]:
    params = SamplingParams(**GREEDY, max_tokens=num_tokens)
    return [output["text"] for output in offline.generate(prompts, params, use_tqdm=False)]


def test_256_streams_at_once_give_the_tokens_of_the_offline_engine(server, offline):
    prompts = [prompt(i) for i in range(256)]

    async def all_streams() -> list[list[dict]]:
        bodies = [{"prompt": text, "max_tokens": 12, **GREEDY} for text in prompts]
        asked = [events(server.port, "/v1/completions", body) for body in bodies]
        return await asyncio.gather(*asked)

    told = asyncio.run(all_streams())
    assert [text_of(stream) for stream in told] == expected(offline, prompts, 12)
    assert len({stream[0]["id"] for stream in told}) == 256
    server.settle()


def leave_at_random(port: int, random: Random) -> None:
    """Ask for something, and hang up: before it is said, while it is, or while the answer comes."""
    text = prompt(random.randrange(1000))
    body = {"max_tokens": random.choice([1, 8, 60]), "stream": random.random() < 0.7}
    body |= {"n": random.choice([1, 1, 1, 3]), "temperature": random.choice([0, 1])}
    if random.random() < 0.5:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
    else:
        path, body["prompt"] = "/v1/completions", [text] * random.choice([1, 2])
    data = request_bytes(path, body)
    if random.random() < 0.2:
        data = data[: random.randrange(len(data))]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(data)
        connection.settimeout(random.choice([0.001, 0.02, 0.1]))
        try:
            for _ in range(random.randrange(4)):
                if not connection.recv(random.choice([1, 200, 4000])):
                    break
        except (TimeoutError, ConnectionError):
            pass
        if random.random() < 0.5:  # a reset instead of a farewell
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def memory_bytes() -> int:
    """What this process has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def num_kept() -> int:
    """How many requests live somewhere in this process, in whatever structure."""
    gc.collect()
    return sum(isinstance(thing, Answer | Sequence) for thing in gc.get_objects())


def test_who_leaves_leaves_nothing_behind_and_changes_nobodys_tokens(server, offline):
    """Every block is free afterwards, no request is kept anywhere, and memory stays as it was."""
    stay = [prompt(i) for i in range(4)]
    wanted = expected(offline, stay, 40)
    before = num_kept()
    used = []

    def staying(text: str) -> str:
        body = {"prompt": text, "max_tokens": 40, **GREEDY}
        return text_of(asyncio.run(events(server.port, "/v1/completions", body)))

    with ThreadPoolExecutor(12) as pool:
        for part in range(3):
            held = [pool.submit(staying, text) for text in stay]
            randoms = [Random(1000 * part + i) for i in range(NUM_LEAVING // 3)]
            list(pool.map(lambda random: leave_at_random(server.port, random), randoms))
            assert [stream.result() for stream in held] == wanted
            server.settle()
            used.append(memory_bytes())
    until(lambda: not server.server.server_state.connections, "every connection is closed")
    assert num_kept() <= before
    assert used[2] - used[1] < 16 << 20, used


def test_a_reader_who_does_not_read_holds_nobody_up(server, offline):
    """Its answer is far longer than what fits in its socket; others' answers come meanwhile."""
    body = {"prompt": prompt(1), "max_tokens": 150, "n": 24, "logprobs": 20, "stream": True}
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(request_bytes("/v1/completions", {**body, **GREEDY}))
        first = slow.recv(1000)
        assert first.startswith(b"HTTP/1.1 200")
        for i in range(3):
            asked = {"prompt": prompt(i), "max_tokens": 12, **GREEDY}
            reply = server.post("/v1/completions", asked)
            assert reply.json()["choices"][0]["text"] == expected(offline, [prompt(i)], 12)[0]
        until(lambda: not server.llm.requests, "its answer is computed, though nobody reads it")
        assert server.server.server_state.tasks, "it was read, into buffers: no test of this law"
    server.settle()


def test_a_full_queue_turns_more_away_and_takes_them_later(server, offline):
    with served(server.llm, max_open=3) as small:
        body = {"prompt": prompt(0), "max_tokens": 200, **GREEDY}
        with socket.create_connection(("127.0.0.1", small.port)) as first:
            first.sendall(request_bytes("/v1/completions", {**body, "n": 3, "stream": True}))
            until(lambda: len(small.client.answers) == 3, "three are open")
            reply = small.post("/v1/completions", body)
            assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
            error = reply.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
            assert small.http.get("/health").status_code == 200
        small.settle()
        reply = small.post("/v1/completions", {**body, "max_tokens": 8})
        assert reply.json()["choices"][0]["text"] == expected(offline, [prompt(0)], 8)[0]


def test_a_call_of_more_requests_than_may_be_open_is_refused_before_any_is_made(server):
    """A body of a megabyte can ask for a hundred million."""
    body = {"prompt": [[5]] * 200_000, "n": 128, "max_tokens": 1}
    began, before = time.monotonic(), memory_bytes()
    reply = server.post("/v1/completions", body)
    assert reply.status_code in (400, 429) and reply.json()["error"]["message"]
    assert time.monotonic() - began < 10 and memory_bytes() - before < 400 << 20
    server.settle()


def test_a_long_body_is_refused_however_it_is_sent(server):
    limit = server.config.max_body_bytes
    body = {"prompt": "a" * limit}
    reply = server.post("/v1/completions", body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    parts = (b"%x\r\n%b\r\n" % (65536, b" " * 65536) for _ in range(limit // 65536 + 2))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    said = raw(server.port, head + b"".join(parts), patience_s=5)
    assert said.startswith(b"HTTP/1.1 413")


def test_a_key_is_asked_for_everywhere_but_on_the_page_and_for_health(server):
    with served(server.llm, api_key="sesame") as locked:
        paths = "/v1/models", "/metrics", "/openapi.json", "/nowhere"
        posts = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
        for given in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
            replies = [locked.http.get(path, headers=given) for path in paths]
            replies += [locked.post(path, {}, headers=given) for path in posts]
            for reply in replies:
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert "sesame" not in reply.text
        assert locked.http.get("/").status_code == locked.http.get("/health").status_code == 200
        right = {"Authorization": "Bearer sesame"}
        assert locked.http.get("/v1/models", headers=right).status_code == 200
        assert locked.post("/tokenize", {"prompt": "a"}, headers=right).status_code == 200


def test_a_failing_step_is_told_and_the_next_request_is_served(server, offline, monkeypatch):
    """The status says so where the reply has not begun; a stream's last event, where it has."""
    body = {"prompt": prompt(0), "max_tokens": 6, **GREEDY}

    def broken(*rest):
        raise ValueError("the model is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(server.llm.model_runner, "run", broken)
        reply = server.post("/v1/completions", body)
        assert reply.status_code == 500 and "on fire" in reply.json()["error"]["message"]
        told = asyncio.run(events(server.port, "/v1/completions", body))
        assert [event["error"]["type"] for event in told] == ["server_error"]
        for _ in range(2):
            assert server.http.get("/health").status_code == 503
    assert server.http.get("/health").status_code == 200  # though nobody has asked for a step
    reply = server.post("/v1/completions", body)
    assert reply.json()["choices"][0]["text"] == expected(offline, [prompt(0)], 6)[0]
    assert server.http.get("/health").status_code == 200
    server.settle()


# The command itself.


@pytest.fixture(scope="module")
def commands():
    """Four servers by the command line; they start together, as that takes most of the time."""
    names = "drained", "stopped", "bereft", "orphaned"
    started = {name: Command("--dtype", "float32", "--device", DEVICE) for name in names}
    yield started
    for command in started.values():
        command.kill()


def begin(port: int, num_tokens: int) -> socket.socket:
    """A stream that has begun."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    body = {"prompt": prompt(3), "max_tokens": num_tokens, "stream": True, **GREEDY}
    connection.sendall(request_bytes("/v1/completions", body))
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


def rest(connection: socket.socket) -> bytes:
    """What still comes."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


def test_sigterm_lets_running_streams_end_and_takes_no_others(commands):
    command = commands["drained"]
    port, engine = command.ready(), command.engine()
    stream = begin(port, 2000)
    command.process.send_signal(signal.SIGTERM)

    def is_deaf() -> bool:
        try:
            return not raw(port, request_bytes("/health", b"", "GET"), patience_s=1)
        except OSError:
            return True

    until(is_deaf, "it takes no more connections")
    assert command.process.poll() is None, "it did not wait for the stream"
    told = rest(stream)
    assert b'"finish_reason": "length"' in told and told.count(b"[DONE]") == 1
    status, said = command.end()
    assert status == 0 and said.count("\n") == 1, said
    assert not is_running(engine)


def test_a_second_sigterm_stops_at_once(commands):
    command = commands["stopped"]
    port, engine = command.ready(), command.engine()
    streams = [begin(port, 4000) for _ in range(8)]
    for _ in range(2):
        command.process.send_signal(signal.SIGTERM)
        time.sleep(1)
    began = time.monotonic()
    _, said = command.end()
    assert time.monotonic() - began < 10 and "Traceback" not in said
    assert not any(b"[DONE]" in rest(stream) for stream in streams), "they had ended before"
    until(lambda: not is_running(engine), "the engine's process ends")


def test_when_the_engine_is_killed_callers_are_told_and_the_server_ends_as_failed(commands):
    command = commands["bereft"]
    port, engine = command.ready(), command.engine()
    stream = begin(port, 4000)
    os.kill(engine, signal.SIGKILL)
    told = rest(stream)
    event = told[told.rindex(b'data: {"error"') :].split(b"\n")[0]
    assert "engine has ended" in json.loads(event[6:])["error"]["message"]
    status, said = command.end()
    assert status == 1 and "engine has ended" in said and "Traceback" not in said
    assert not is_running(engine)


def test_when_the_server_is_killed_its_engine_ends(commands):
    command = commands["orphaned"]
    port, pids = command.ready(), command.children()
    stream = begin(port, 4000)
    command.process.kill()
    rest(stream)
    command.end()
    until(lambda: not any(map(is_running, pids)), "its processes end")

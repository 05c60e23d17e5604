"""The pipe between server and engine carries messages of any size, whatever loop waits at it."""

from __future__ import annotations

import asyncio
import time
from functools import cache
from itertools import count
from multiprocessing import Pipe
from threading import Thread

import pytest
import uvloop

from nanovllm import LLM, SamplingParams
from nanovllm.engine import guide
from nanovllm.engine.requests import make_sequence
from nanovllm.serve.client import EngineClient, pieces
from nanovllm.serve.engine_loop import WATCH, Ask, EngineLoop, News
from nanovllm.serve.engine_process import About, about, in_thread

LARGE = 400_000  # tokens: more bytes than a socket takes at once
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
def test_large_messages_pass_both_ways_whoever_is_slow(llm, loop):
    """The engine's end begins to read late, and answers with what the other end must wait for."""
    ours, theirs = Pipe()
    known = about(llm)
    theirs.send(About(known.model, None, known.limits, {}))  # no text is asked for
    asked = []

    def engine() -> None:
        time.sleep(0.5)  # it is in a step
        while len(asked) < 2:
            asked.extend(ask for ask in theirs.recv() if ask is not None)
        for ask in asked:
            told = tuple(News(ask.key, [7] * LARGE, [], "length"))
            theirs.send(([told], None))

    async def ask() -> list[int]:
        client.start()
        params = SamplingParams(max_tokens=1)
        seqs = [make_sequence(count(), [7], params, None, known.limits) for _ in range(2)]
        for seq in seqs:
            seq.token_ids = [7] * LARGE
        found = [0, 0]
        async for index, piece in pieces(client.submit(seqs)):
            found[index] += len(piece["token_ids"])
        assert client.is_alive
        client.close()
        return found

    client = EngineClient(ours)
    thread = Thread(target=engine, daemon=True)
    thread.start()
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(asyncio.wait_for(ask(), 60)) == [LARGE, LARGE]
    thread.join(10)
    assert [len(ask.token_ids) for ask in asked] == [LARGE, LARGE]


def test_one_who_does_not_read_holds_up_nobody_else(llm):
    """What is too large for his pipe waits, and the loop sleeps; when he reads, all is there."""
    (slow, to_slow), (quick, to_quick) = Pipe(), Pipe()
    loop = EngineLoop(llm, to_slow, to_quick)
    large = tuple(News(1, [7] * LARGE, [], "length"))
    loop.askers[to_slow.fileno()].untold.append(large)
    thread = Thread(target=loop.run, daemon=True)
    thread.start()
    for key in range(3):
        quick.send([Ask(key, [7, 8], SamplingParams(max_tokens=1), True)])
        assert quick.poll(30), "it waits for the other"
        (told,), _ = quick.recv()
        assert News(*told).key == key and News(*told).finish_reason == "length"
    slow.send([Ask(WATCH)])
    began, used = time.monotonic(), time.process_time()
    time.sleep(0.5)
    assert time.process_time() - used < 0.5 * (time.monotonic() - began), "it does not sleep"
    (told,), report = slow.recv()
    assert told == large
    while report is None:
        assert slow.poll(30)
        _, report = slow.recv()
    assert report.failure is None
    slow.close()
    quick.send([None])
    thread.join(30)
    assert not thread.is_alive() and not loop.askers


def test_the_first_guided_request_finds_its_table_of_tokens_made(monkeypatch):
    """A large vocabulary takes a second, which would lie between two steps."""
    made = []
    build = guide.token_table.__wrapped__
    monkeypatch.setattr(guide, "token_table", cache(lambda *a: made.append(a) or build(*a)))
    llm = LLM(device="cpu")
    try:
        ours = in_thread(llm)
        assert ours.poll(60) and isinstance(ours.recv(), About)
        assert len(made) == 1
        params = SamplingParams(max_tokens=8, json_schema={"type": "integer"})
        ours.send([Ask(1, [7, 8], params)])
        assert ours.poll(60) and ours.recv()
        assert len(made) == 1
    finally:
        ours.close()


def test_a_tokenizer_that_no_grammar_can_use_is_no_reason_not_to_serve(monkeypatch):
    def fails(*_):
        raise ValueError("an unknown kind of tokenizer")

    monkeypatch.setattr(guide, "token_table", fails)
    guide.prepare_guides(object(), 100)
    guide.prepare_guides(None, 100)

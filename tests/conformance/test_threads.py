"""Threads, callbacks and garbage: what a running step holds is changed by nobody."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from device import build
from results import results

from nanovllm import SamplingParams

PROMPTS = ["Once upon a time", "One day, Tom", "Hello", "The little fox"]
LIMIT_S = 120  # a thread that hangs is a failure, not a wait


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def tokens(llm, prompt, params) -> list[int]:
    return llm.generate(prompt, params, use_tqdm=False)[0]["token_ids"]


def inside_step(llm, monkeypatch, number: int, action) -> list:
    """Call `action` in the middle of that step; the list says that it was called."""
    run, calls = llm.model_runner.run, []

    def wrapped(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == number:
            action()
        return run(*args, **kwargs)

    monkeypatch.setattr(llm.model_runner, "run", wrapped)
    return calls


def finish(llm) -> dict[int, list[int]]:
    """Step to the end; the tokens of each request that got some, by its id."""
    found = {}
    while not llm.is_finished():
        found |= {seq.seq_id: seq.completion_token_ids for seq in llm.step()}
    return found


def in_thread(action) -> None:
    """Run it in another thread, and wait for that."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


# ---- Inside a step ----


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("where", ["a callback", "another thread"])
def test_an_abort_inside_a_step_waits_for_its_end(llm, monkeypatch, number, where):
    """The other request's tokens stay its own, and so does what the cache keeps of it."""
    expected = tokens(llm, PROMPTS[0], greedy(12))
    ids = [llm.add_request(prompt, greedy(12)) for prompt in PROMPTS[:2]]  # block 0, block 1
    with monkeypatch.context() as patch:
        call = {"a callback": lambda f: f(), "another thread": in_thread}[where]
        calls = inside_step(llm, patch, number, lambda: call(lambda: llm.abort(ids[1])))
        assert finish(llm)[ids[0]] == expected
    assert len(calls) >= number
    assert tokens(llm, PROMPTS[0], greedy(12)) == expected
    with pytest.raises(ValueError, match=str(ids[1])):
        llm.abort(ids[1])


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_a_stream_that_ends_inside_a_step_waits_for_its_end(llm, monkeypatch, how):
    expected = tokens(llm, PROMPTS[0], greedy(12))
    other = llm.add(llm.make_sequence(PROMPTS[0], greedy(12)))
    held = [llm.stream(PROMPTS[1], greedy(12))]
    next(held[0])

    def end():
        if how == "closed":
            held[0].close()
        else:
            held.clear()
            gc.collect()

    with monkeypatch.context() as patch:
        calls = inside_step(llm, patch, 3, end)
        finish(llm)
    assert len(calls) >= 3 and other.completion_token_ids == expected
    assert tokens(llm, PROMPTS[0], greedy(12)) == expected


def test_a_reset_inside_a_step_waits_for_its_end(llm, monkeypatch):
    expected = tokens(llm, PROMPTS[0], greedy(8))
    seq = llm.add(llm.make_sequence(PROMPTS[0], greedy(8)))
    seen = []

    def reset():
        llm.reset()
        seen.append(seq.is_finished)

    with monkeypatch.context() as patch:
        inside_step(llm, patch, 2, reset)
        finish(llm)
    assert seen == [False] and seq.finish_reason == "abort"
    assert tokens(llm, PROMPTS[0], greedy(8)) == expected


def test_a_request_that_is_added_inside_a_step_joins_the_next(llm, monkeypatch):
    expected = [tokens(llm, prompt, greedy(8)) for prompt in PROMPTS[:2]]
    ids = [llm.add_request(PROMPTS[0], greedy(8))]
    with monkeypatch.context() as patch:
        inside_step(llm, patch, 2, lambda: ids.append(llm.add_request(PROMPTS[1], greedy(8))))
        found = finish(llm)
    assert [found[i] for i in ids] == expected


def test_a_step_can_not_be_entered_from_inside(llm, monkeypatch):
    """It would wait for itself; the request that asked for it is lost, and the engine usable."""
    expected = tokens(llm, PROMPTS[0], greedy(8))
    with monkeypatch.context() as patch:
        inside_step(llm, patch, 2, llm.step)
        with pytest.raises(RuntimeError, match="inside"):
            tokens(llm, PROMPTS[0], greedy(8))
    assert llm.is_finished()
    assert tokens(llm, PROMPTS[0], greedy(8)) == expected


# ---- Several threads ----


def test_threads_share_an_engine_and_each_gets_its_own(llm):
    """Calls of every kind from six threads, some of which give up half-way."""
    params = [greedy(n) for n in (6, 17, 9, 30)]
    expected = [tokens(llm, *request) for request in zip(PROMPTS, params, strict=True)]

    def generate(i: int):
        out = llm.generate([PROMPTS[i], PROMPTS[i - 1]], [params[i], params[i - 1]], False)
        assert [o["token_ids"] for o in out] == [expected[i], expected[i - 1]]
        assert [o["finish_reason"] for o in out] == ["length"] * 2

    def stream(i: int):
        pieces = list(llm.stream(PROMPTS[i], params[i]))
        assert [t for piece in pieces for t in piece["token_ids"]] == expected[i]
        (whole,) = llm.generate(PROMPTS[i], params[i], use_tqdm=False)
        assert "".join(piece["text"] for piece in pieces) == whole["text"]

    def give_up(i: int):
        pieces = llm.stream(PROMPTS[i], params[i])
        assert next(pieces)["token_ids"][0] == expected[i][0]
        pieces.close()
        llm.abort(llm.add_request(PROMPTS[i], params[i]))

    def step(i: int):
        seq = llm.add(llm.make_sequence(PROMPTS[i], params[i]))
        while not seq.is_finished:
            llm.step()
        assert seq.completion_token_ids == expected[i]

    kinds = (generate, stream, give_up, step)
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(kinds[n % 4], n // 4 % 4) for n in range(32)]
        for job in jobs:
            job.result(LIMIT_S)
    assert llm.is_finished()
    assert [tokens(llm, *request) for request in zip(PROMPTS, params, strict=True)] == expected


def test_a_stream_gets_its_pieces_while_another_thread_steps(llm):
    """Who steps without a pause does not keep the others from what the steps have brought."""
    going = llm.add(llm.make_sequence(PROMPTS[0], greedy(200)))
    seen = []

    def others():
        while not going.is_finished:
            llm.step()

    stepping = threading.Thread(target=others, daemon=True)
    stepping.start()
    for piece in llm.stream(PROMPTS[1], greedy(12)):
        seen.append((len(piece["token_ids"]), going.is_finished))
    llm.abort(going.seq_id) if not going.is_finished else None
    stepping.join(LIMIT_S)
    assert not stepping.is_alive() and sum(number for number, _ in seen) == 12


def test_an_exception_reaches_every_caller_whose_request_it_lost(llm, monkeypatch):
    """One thread's step fails, and the other is not handed a cut result as if it were whole."""

    class Broken(Exception):
        pass

    expected = results(llm.generate(PROMPTS[0], greedy(8), use_tqdm=False))
    queues, run = getattr(llm, "scheduler", llm), llm.model_runner.run
    together, errors = threading.Barrier(2), []

    def fails_for_two(*args):
        if len(queues.waiting) + len(queues.running) == 2:
            raise Broken
        return run(*args)

    def call(prompt: str):
        together.wait(LIMIT_S)
        try:
            llm.generate(prompt, greedy(200), use_tqdm=False)
        except Exception as error:
            errors.append(error)

    with monkeypatch.context() as patch:
        patch.setattr(llm.model_runner, "run", fails_for_two)
        threads = [threading.Thread(target=call, args=[p], daemon=True) for p in PROMPTS[:2]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
    (broken,) = (error for error in errors if isinstance(error, Broken))
    (lost,) = (error for error in errors if error is not broken)
    assert type(lost) is RuntimeError and lost.__cause__ is broken
    assert llm.is_finished()
    assert results(llm.generate(PROMPTS[0], greedy(8), use_tqdm=False)) == expected


def test_exit_waits_for_the_step_that_another_thread_is_in():
    llm = build(dtype="float32")
    inside, go_on = threading.Event(), threading.Event()
    run = llm.model_runner.run

    def slow(*args):
        inside.set()
        go_on.wait(LIMIT_S)
        return run(*args)

    llm.model_runner.run = slow
    outputs = []
    worker = threading.Thread(
        target=lambda: outputs.extend(llm.generate(PROMPTS[0], greedy(8), use_tqdm=False)),
        daemon=True,
    )
    worker.start()
    assert inside.wait(LIMIT_S)
    leaving = threading.Thread(target=llm.exit, daemon=True)
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive()
    go_on.set()
    for thread in (leaving, worker):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert [out["finish_reason"] for out in outputs] in (["abort"], [])
    assert llm.is_finished()


# ---- Ctrl-C ----


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_abort_leaves_an_empty_usable_engine(llm, monkeypatch, again):
    """Wherever it strikes: no finished sequence stays behind to be waited for."""
    expected = results(llm.generate(PROMPTS[0], greedy(8), use_tqdm=False))
    ids = [llm.add_request(prompt, greedy(20)) for prompt in PROMPTS[:3]]
    llm.step()
    queues = getattr(llm, "scheduler", llm)
    name = "abort" if hasattr(llm, "scheduler") else "drop_finished"
    whole = getattr(queues, name)

    def interrupted(*args):
        if again:  # it was all done but the last line
            whole(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(queues, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.abort(ids[1])
    assert llm.is_finished() and llm.step() == []
    assert results(llm.generate(PROMPTS[0], greedy(8), use_tqdm=False)) == expected


def test_an_interruption_between_two_steps_takes_the_callers_requests_alone(llm, monkeypatch):
    from nanovllm.engine.progress import Progress

    expected = tokens(llm, PROMPTS[0], greedy(12))
    mine = llm.add(llm.make_sequence(PROMPTS[0], greedy(12)))

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[1:3], greedy(20), use_tqdm=False)
    assert not llm.is_finished() and not mine.is_finished
    assert finish(llm)[mine.seq_id] == expected

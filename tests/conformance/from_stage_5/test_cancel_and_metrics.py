"""Requests are cancelled in every state, and what became of each is told."""

from __future__ import annotations

from itertools import count

import pytest
from checkpoints import random_prompts
from device import PLAIN
from memory import (
    add_all,
    alone,
    check_books,
    check_empty,
    engine,
    greedy,
    step_through,
    unfinished,
    varied,
)

from nanovllm import LLM
from nanovllm.engine.outputs import metrics_of

PROMPTS = random_prompts((9, 30, 9, 21), 1536, seed=20)
PARAMS = varied((24, 18, 24, 3))


def at_first(llm: LLM, ids: list[int]) -> int:
    """One that has not begun."""
    return ids[2]


def in_its_prompt(llm: LLM, ids: list[int]) -> int:
    """One whose prompt has been computed in part."""
    while True:
        llm.step()
        for seq in llm.scheduler.running:
            if 0 < seq.num_computed_tokens < seq.num_prompt_tokens:
                assert seq.num_completion_tokens == 0
                return seq.seq_id


def in_its_answer(llm: LLM, ids: list[int]) -> int:
    """One that has generated a few tokens."""
    for _ in range(8):
        llm.step()
    (seq, *_) = llm.scheduler.running
    assert seq.num_completion_tokens > 1
    return seq.seq_id


def preempted(llm: LLM, ids: list[int]) -> int:
    """One that waits with a part of its answer."""
    while True:
        llm.step()
        for seq in llm.scheduler.waiting:
            if seq.num_completion_tokens > 0:
                assert seq.num_preemptions > 0 and not seq.block_table
                return seq.seq_id


def crowded(max_num_batched_tokens: int = 12):
    """An engine whose pool is too small for the requests above."""
    return engine(
        kvcache_block_size=4,
        num_kvcache_blocks=16,
        max_num_batched_tokens=max_num_batched_tokens,
    )


@pytest.mark.parametrize("state", [at_first, in_its_prompt, in_its_answer, preempted])
def test_a_request_is_cancelled_in_any_state(state):
    """It is gone at once, its blocks are free, and the others get their tokens."""
    expected = alone(PROMPTS, PARAMS)
    with crowded() as llm:
        ids = add_all(llm, PROMPTS, PARAMS)
        cancelled = state(llm, ids)
        llm.abort(cancelled)
        check_books(llm)
        left = {seq.seq_id for seq in unfinished(llm)}
        assert cancelled not in left
        for unknown in (cancelled, max(ids) + 1, -1):
            with pytest.raises(ValueError, match=str(unknown)):
                llm.abort(unknown)
        found = {}
        while not llm.is_finished():
            found |= {seq.seq_id: seq for seq in llm.step()}
            check_books(llm)
        for number, seq_id in enumerate(ids):
            if seq_id in left:
                assert found[seq_id].completion_token_ids == expected[number]
        assert cancelled not in found
        assert step_through(llm, PROMPTS, PARAMS) == expected


def test_all_may_be_cancelled():
    with crowded() as llm:
        ids = add_all(llm, PROMPTS, PARAMS)
        preempted(llm, ids)
        for seq_id in ids:
            llm.abort(seq_id)
            check_books(llm)
        check_empty(llm)
        assert llm.step() == []


def test_a_finished_request_can_not_be_cancelled():
    with crowded() as llm:
        ids = add_all(llm, PROMPTS, PARAMS)
        while not any(seq.is_finished for seq in llm.step()):
            pass
        (finished,) = set(ids) - {
            s.seq_id for s in (*llm.scheduler.running, *llm.scheduler.waiting)
        }
        with pytest.raises(ValueError, match=str(finished)):
            llm.abort(finished)
        check_books(llm)
        step_through(llm)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that moves by one second whenever it is read."""
    ticks = count(100.0)
    for module in ("llm_engine", "scheduler"):
        monkeypatch.setattr(f"nanovllm.engine.{module}.perf_counter", lambda: next(ticks))


def test_times_are_measured_from_the_arrival(ticking):
    """A prompt of three chunks and four tokens: a step is a second."""
    with engine(max_num_batched_tokens=10, **PLAIN) as llm:
        (out,) = llm.generate(PROMPTS[1], greedy(4), use_tqdm=False)
    assert out["metrics"] == dict(
        time_to_first_token=3.0, time_per_output_token=1.0, num_cached_tokens=0, num_preemptions=0
    )


def test_waiting_counts_and_one_token_has_no_time_per_token(ticking):
    with engine(max_num_seqs=1, **PLAIN) as llm:
        outputs = llm.generate(PROMPTS[:3], [greedy(n) for n in (1, 1, 3)], use_tqdm=False)
    times = [tuple(out["metrics"].values())[:2] for out in outputs]
    assert times == [(3.0, None), (3.0, None), (3.0, 1.0)], "added at 100, 101, 102"


def test_real_times_are_positive_and_in_order():
    with engine(max_num_seqs=1) as llm:
        outputs = llm.generate(PROMPTS, greedy(3), use_tqdm=False)
    first = [out["metrics"]["time_to_first_token"] for out in outputs]
    assert 0 < first[0] and first == sorted(first)
    assert all(out["metrics"]["time_per_output_token"] > 0 for out in outputs)


def test_cached_tokens_are_those_of_the_prompt():
    with engine(kvcache_block_size=4) as llm:
        counts = []
        for length in (30, 30, 28, 29, 3, 30):
            if len(counts) == 5:
                llm.reset_prefix_cache()
            (out,) = llm.generate(PROMPTS[1][:length], greedy(9), use_tqdm=False)
            counts.append(out["metrics"]["num_cached_tokens"])
    assert counts == [0, 28, 28, 28, 0, 0]


def test_preemptions_are_counted_and_a_request_does_not_hit_itself():
    """What a preempted request finds again was not saved: it had been computed for it before."""
    with crowded() as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        metrics = [out["metrics"] for out in outputs]
        assert llm.scheduler.num_preemptions == sum(m["num_preemptions"] for m in metrics) > 0
        assert [m["num_cached_tokens"] for m in metrics] == [0] * 4
        assert all(out["metrics"]["time_to_first_token"] > 0 for out in outputs)


def test_the_last_piece_of_a_stream_has_the_metrics(ticking):
    with engine(**PLAIN) as llm:
        pieces = list(llm.stream(PROMPTS[0], greedy(6)))
        assert not any("metrics" in piece for piece in pieces[:-1])
        assert pieces[-1]["metrics"]["time_to_first_token"] == 1.0
        assert pieces[-1]["metrics"]["time_per_output_token"] == 1.0


def test_a_request_without_a_token_has_no_times():
    with engine() as llm:
        seq = llm.add(llm.make_sequence(PROMPTS[0], greedy(6)))
        llm.abort(seq.seq_id)
        assert list(metrics_of(seq).values()) == [None, None, 0, 0]

"""Prompts in chunks, requests preempted and taken up again: the tokens stay what they are alone."""

from __future__ import annotations

import os
from functools import cache
from itertools import product
from random import Random

import pytest
from checkpoints import random_prompts
from device import PLAIN
from memory import (
    add_all,
    alone,
    block_manager,
    check_books,
    engine,
    greedy,
    hits,
    run_lengths,
    smallest_pool,
    step_through,
    tokens,
    varied,
)

BLOCK = 8
SHARED, *TAILS = random_prompts((40, 1, 9, 24), 1536, seed=8)
PROMPTS = [SHARED, *(SHARED + tail for tail in TAILS), SHARED[:17], TAILS[1], SHARED]
PROMPTS += random_prompts((1, 2, 31, 90), 1536, seed=9)
PARAMS = varied((30, 12, 25, 1, 40, 33, 2, 17, 20, 8, 5))


@cache
def tokens_alone() -> list[list[int]]:
    """The tokens that each request gets without the cache, when nothing else runs."""
    return alone(PROMPTS, PARAMS)


SETTINGS = list(
    product(
        (1, 2, 7, 16, 256),  # tokens in a block
        (1, 5, 16, 33, 16384),  # tokens in a step
        (1, 3, 512),  # sequences that run at once
        ("smallest", "half", "roomy"),  # pool
        (True, False),  # prefix cache
    )
)
if not os.environ.get("NANOVLLM_OPERATIONS"):  # a sample with nearly every pair of values
    SETTINGS = Random(11231).sample(SETTINGS, 26)


@pytest.mark.parametrize(("block_size", "budget", "max_num_seqs", "pool", "cached"), SETTINGS)
def test_no_setting_changes_a_token(block_size, budget, max_num_seqs, pool, cached):
    """Twice: what the first round has left in the cache is found by the second."""
    # A token a step takes long: all requests only in the long runs.
    few = slice(0, 5 if budget == 1 and not os.environ.get("NANOVLLM_OPERATIONS") else None)
    prompts, params, expected = PROMPTS[few], PARAMS[few], tokens_alone()[few]
    options = smallest_pool(block_size, prompts, params)
    options["num_kvcache_blocks"] *= {"smallest": 1, "half": 3, "roomy": 20}[pool]
    options |= dict(max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
    with engine(**options, enable_prefix_caching=cached) as llm:
        assert tokens(llm, prompts, params) == expected
        assert step_through(llm, prompts, params) == expected


@pytest.mark.parametrize("length", [39, 40, 41])
@pytest.mark.parametrize("budget", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 12, 2 * BLOCK, 39, 40, 41])
def test_chunks_may_end_anywhere(monkeypatch, budget, length):
    """Inside a block, at its edge, a token before or behind it; the last may be a single token."""
    prompt = (SHARED + TAILS[0])[:length]
    (expected,) = alone([prompt], [greedy(10)])
    with engine(kvcache_block_size=BLOCK, max_num_batched_tokens=budget, **PLAIN) as llm:
        lengths = run_lengths(llm, monkeypatch)
        assert tokens(llm, prompt, greedy(10)) == [expected]
        whole, rest = divmod(length, budget)
        assert lengths == [budget] * whole + [rest] * (rest > 0) + [1] * 9
        lengths.clear()
        assert tokens(llm, prompt, greedy(10)) == [expected]
        assert lengths[0] == min(length - length // BLOCK * BLOCK or 1, budget)


@pytest.mark.parametrize("budget", [2, BLOCK, BLOCK + 1, BLOCK + 2])
def test_a_long_prompt_does_not_hold_up_a_request_that_runs(monkeypatch, budget):
    """It gets what the other leaves of each step's budget."""
    prompts, params = [TAILS[1], PROMPTS[-1]], [greedy(60), greedy(5)]
    expected = alone(prompts, params)
    with engine(kvcache_block_size=BLOCK, max_num_batched_tokens=budget, **PLAIN) as llm:
        first = llm.add_request(prompts[0], params[0])
        while not any(seq.seq_id == first for seq in llm.step()):
            pass
        second = llm.add_request(prompts[1], params[1])
        lengths = run_lengths(llm, monkeypatch)
        found, arrived = {}, None
        while not llm.is_finished():
            grown = {seq.seq_id: seq for seq in llm.step()}
            found |= grown
            assert first in grown or found[first].is_finished
            if second in grown and arrived is None:
                arrived = len(lengths)
        assert [found[i].completion_token_ids for i in (first, second)] == expected
        assert max(lengths) == budget
        alone_after = found[first].num_completion_tokens  # then the whole budget is the prompt's
        assert arrived <= max(-(-90 // (budget - 1)), alone_after + 90 // budget)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_what_a_cancelled_request_has_not_computed_is_not_found(num_steps):
    """Its blocks lie there with what was in them before."""
    (expected,) = alone([SHARED], [greedy(10)])
    with engine(kvcache_block_size=BLOCK, max_num_batched_tokens=12, **PLAIN) as llm:
        llm.model_runner.kv_cache.fill_(1e4)
        seq_id = llm.add_request(SHARED, greedy(10))
        for _ in range(num_steps):
            llm.step()
        llm.abort(seq_id)
        assert hits(block_manager(llm), SHARED) == num_steps * 12 // BLOCK * BLOCK
        assert tokens(llm, SHARED, greedy(10)) == [expected]


def test_a_preempted_request_finds_what_is_left_of_it():
    """The pool holds one to its end and half of the other, which then goes on from there."""
    prompts, params = random_prompts((8, 8), 1536, seed=10), [greedy(20), greedy(16)]
    expected = alone(prompts, params)
    with engine(kvcache_block_size=4, num_kvcache_blocks=8, **PLAIN) as llm:
        ids = add_all(llm, prompts, params)
        llm.step()
        first, second = llm.scheduler.running
        while second.is_running:
            llm.step()
            check_books(llm)
        assert first.is_running and (second.num_preemptions, first.num_preemptions) == (1, 0)
        assert second.completion_token_ids == expected[1][: second.num_completion_tokens]
        while not second.is_running:
            llm.step()
            check_books(llm)
        assert first.is_finished and 0 < second.num_cached_tokens < len(second)
        step_through(llm)
        assert [first.completion_token_ids, second.completion_token_ids] == expected
        assert llm.scheduler.num_preemptions == 1 and ids == [first.seq_id, second.seq_id]


def test_a_preempted_request_runs_again_only_what_was_taken_from_it(monkeypatch):
    """The other took one block, the end of its text, and is then cancelled."""
    prompts, params = random_prompts((12, 12), 1536, seed=11), [greedy(20), greedy(16)]
    expected = alone(prompts, params)
    with engine(kvcache_block_size=4, num_kvcache_blocks=8, **PLAIN) as llm:
        add_all(llm, prompts, params)
        llm.step()
        first, second = llm.scheduler.running
        while second.is_running:
            llm.step()
        assert len(second) == 17, "its four blocks were full"
        llm.abort(first.seq_id)
        lengths = run_lengths(llm, monkeypatch)
        llm.step()
        assert second.num_cached_tokens == 12 and lengths == [17 - 12]
        step_through(llm)
        assert second.completion_token_ids == expected[1]


def test_under_pressure_everyone_comes_to_the_end():
    """Many preemptions; the books are right after each step."""
    prompts = random_prompts((9,) * 12, 1536, seed=12)
    params = varied((30,) * 12)
    expected = alone(prompts, params)
    for cached in (True, False):
        with engine(
            kvcache_block_size=2, num_kvcache_blocks=40, enable_prefix_caching=cached
        ) as llm:
            assert step_through(llm, prompts, params) == expected
            assert llm.scheduler.num_preemptions > 10
            assert block_manager(llm).num_hit_tokens > 0 or not cached

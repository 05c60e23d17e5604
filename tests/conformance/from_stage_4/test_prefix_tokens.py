"""Prefix caching saves work and changes no token."""

from __future__ import annotations

from functools import cache
from itertools import count

import pytest
import torch
from checkpoints import random_prompts
from device import PLAIN
from memory import (
    HASHES,
    NO_PREFIX_CACHE,
    add_all,
    alone,
    block_manager,
    check_books,
    check_empty,
    engine,
    greedy,
    hit_rate,
    hits,
    queues,
    run_lengths,
    smallest_pool,
    step_through,
    tokens,
    varied,
)

from nanovllm import LLM
from nanovllm.engine.block_manager import BlockManager

SHARED, *TAILS = random_prompts((64, 1, 9, 40), 1536, seed=6)
PROMPTS = [SHARED, *(SHARED + tail for tail in TAILS), SHARED[:32], SHARED[:33], SHARED, TAILS[2]]
PARAMS = varied((12, 30, 1, 25, 40, 2, 17, 20))
SMALL_POOLS = {size: smallest_pool(size, PROMPTS, PARAMS) for size in (1, 2, 7, 16, 256)}


@cache
def tokens_alone() -> list[list[int]]:
    """The tokens that each request gets without the cache, when nothing else runs."""
    return alone(PROMPTS, PARAMS)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 256])
def test_the_cache_changes_no_token(block_size, cached):
    with engine(kvcache_block_size=block_size, enable_prefix_caching=cached) as llm:
        for order in (slice(None), slice(None), slice(None, None, -1)):
            assert tokens(llm, PROMPTS[order], PARAMS[order]) == tokens_alone()[order]
        assert (block_manager(llm).num_hit_tokens > 0) == (cached and block_size < 256)
        assert (hit_rate(block_manager(llm)) > 0.5) == (cached and block_size < 256)


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 256])
def test_the_cache_changes_no_token_in_the_smallest_pool(block_size):
    """Where nearly every block that is found is soon overwritten."""
    with engine(**SMALL_POOLS[block_size]) as llm:
        for _ in range(2):
            assert step_through(llm, PROMPTS, PARAMS) == tokens_alone()


@pytest.mark.parametrize("kind", HASHES)
@pytest.mark.parametrize("options", [dict(kvcache_block_size=4), SMALL_POOLS[7]], ids=str)
def test_colliding_hashes_change_no_token(monkeypatch, options, kind):
    monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(HASHES[kind]))
    with engine(**options) as llm:
        for _ in range(2):
            assert step_through(llm, PROMPTS, PARAMS) == tokens_alone()
        assert block_manager(llm).num_hit_tokens > 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 47, 48])
def test_a_known_prompt_runs_only_what_is_behind_its_last_full_block(monkeypatch, length):
    """And its last token in any case: its logits are wanted."""
    prompt = SHARED[:length]
    with engine(kvcache_block_size=16, **PLAIN) as llm:
        expected = tokens(llm, prompt, greedy(3))
        lengths = run_lengths(llm, monkeypatch)
        assert tokens(llm, prompt, greedy(3)) == expected
        assert lengths == [length - (length // 16 * 16) or 1, 1, 1]


def test_a_found_block_is_not_written_again():
    """Neither by the prompt's last token, which is run once more, nor by what follows."""
    prompt = SHARED[:32]
    with engine(kvcache_block_size=16, num_kvcache_blocks=8, **PLAIN) as llm:
        tokens(llm, prompt, greedy(1))
        pool = llm.model_runner.kv_cache[:, :, : block_manager(llm).num_blocks]
        pool.fill_(0.25)
        llm.add_request(prompt, greedy(40))
        llm.step()
        assert pool.eq(0.25).all(), "the last token of a known prompt is written nowhere"
        (seq,) = queues(llm).running
        for _ in range(8):
            llm.step()
        untouched = sorted({*range(8)} - {*seq.block_table[2:]})
        assert len(untouched) == 7 and pool[:, :, untouched].eq(0.25).all()
        llm.abort(seq.seq_id)


def test_equal_prompts_of_one_step_share_their_blocks(monkeypatch):
    with engine(kvcache_block_size=16, **PLAIN) as llm:
        lengths = run_lengths(llm, monkeypatch)
        prompts = [SHARED[:40]] * 4 + [SHARED[:32]]
        expected = tokens(llm, prompts[:1], greedy(5))
        llm.reset_prefix_cache()
        lengths.clear()
        assert tokens(llm, prompts[:4], greedy(5)) == expected * 4
        assert lengths[0] == 40 + 3 * 8, "all of the first, what differs of the others"
        assert lengths[1:] == [4] * 4
        llm.reset_prefix_cache()
        add_all(llm, prompts, [greedy(5)] * 5)
        llm.step()
        tables = [seq.block_table for seq in queues(llm).running]
        assert all(table[:2] == tables[0][:2] for table in tables)
        assert step_through(llm)[:4] == expected * 4


def test_hits_are_counted():
    """At admission, in tokens; a request's own computed output counts for the next one."""
    with engine(kvcache_block_size=16) as llm:
        manager = block_manager(llm)
        assert (manager.num_queried_tokens, manager.num_hit_tokens) == (0, 0)
        prompt = SHARED[:40]
        for _ in range(4):  # turns of a conversation
            before = manager.num_queried_tokens, manager.num_hit_tokens
            known = hits(manager, prompt)
            answer = tokens(llm, prompt, greedy(21))[0]
            assert manager.num_queried_tokens - before[0] == len(prompt)
            assert manager.num_hit_tokens - before[1] == known
            computed = len(prompt) + 20  # the last token of an answer is not run
            assert hits(manager, prompt + answer) == computed // 16 * 16
            prompt = prompt + answer + TAILS[1]
        assert 0.5 < hit_rate(manager) < 1


def test_prompts_that_differ_early_share_nothing_behind_it(monkeypatch):
    with engine(kvcache_block_size=8, **PLAIN) as llm:
        tokens(llm, SHARED, greedy(1))
        lengths = run_lengths(llm, monkeypatch)
        for place in (0, 8, 16, 23):
            prompt = list(SHARED)
            prompt[place] = (prompt[place] + 1) % 1536
            lengths.clear()
            found = tokens(llm, prompt, greedy(6))
            assert lengths[0] == 64 - place // 8 * 8
            assert alone([prompt], [greedy(6)]) == found


def test_without_prefix_caching_every_prompt_is_run_whole(monkeypatch):
    with engine(kvcache_block_size=16, enable_prefix_caching=False, **PLAIN) as llm:
        lengths = run_lengths(llm, monkeypatch)
        for _ in range(2):
            tokens(llm, [SHARED, SHARED], greedy(2))
        assert lengths == [128, 2] * 2
        assert block_manager(llm).num_hit_tokens == 0


def negate_values(llm: LLM) -> None:
    """New weights: the first layer's values turn round."""
    attention, shape = llm.model_runner.model.model.layers[0].self_attn, llm.model_config
    merged = hasattr(attention, "qkv_proj")  # from chapter 7 on; its last rows are v's
    weight = attention.qkv_proj.weight if merged else attention.v_proj.weight
    with torch.no_grad():
        weight[-shape.num_key_value_heads * shape.head_dim :].neg_()


def test_after_a_reset_new_weights_give_their_own_tokens():
    """Also where a request was running, with a block half full of the old weights' values."""
    with engine(**NO_PREFIX_CACHE) as fresh:
        negate_values(fresh)
        expected = tokens(fresh, SHARED, greedy(12))
    with engine(kvcache_block_size=16) as llm:
        old = tokens(llm, SHARED, greedy(12))
        assert old != expected, "a bad fixture: the weights do not matter"
        llm.reset_prefix_cache()
        llm.add_request(SHARED[:7], greedy(30))
        llm.step()
        negate_values(llm)
        llm.reset_prefix_cache()
        check_books(llm)
        (found,) = step_through(llm)
        assert hits(block_manager(llm), SHARED[:7] + found) == 0, "from before the reset"
        assert tokens(llm, SHARED, greedy(12)) == expected
        negate_values(llm)
        llm.reset_prefix_cache()
        assert tokens(llm, SHARED, greedy(12)) == old


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_reset_in_the_middle_changes_no_token(num_steps):
    with engine(**SMALL_POOLS[7]) as llm:
        steps = count(1)

        def reset_now_and_then(llm):
            if next(steps) % num_steps == 0:
                llm.reset_prefix_cache()
            check_books(llm)

        assert step_through(llm, PROMPTS, PARAMS, reset_now_and_then) == tokens_alone()


def test_a_failed_step_leaves_nothing_to_be_found(monkeypatch):
    """The blocks of a step that never ran must not be taken for computed ones."""

    def broken(*args):
        raise KeyboardInterrupt

    with engine(kvcache_block_size=4, **PLAIN) as llm:
        expected = tokens(llm, SHARED, greedy(5))
        llm.reset_prefix_cache()
        with monkeypatch.context() as patch:
            patch.setattr(llm.model_runner.model, "forward", broken)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(SHARED, greedy(5), use_tqdm=False)
        check_empty(llm)
        llm.model_runner.kv_cache.fill_(1e4)
        assert hits(block_manager(llm), SHARED) == 0
        assert tokens(llm, SHARED, greedy(5)) == expected

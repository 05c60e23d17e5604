"""Where the cache's blocks lie, how large and how many they are: no token depends on it."""

from __future__ import annotations

from functools import cache

import pytest
from checkpoints import random_prompts
from device import build
from memory import (
    NO_PREFIX_CACHE,
    add_all,
    alone,
    block_manager,
    check_books,
    check_empty,
    engine,
    free_ids,
    greedy,
    smallest_pool,
    step_through,
    tokens,
    varied,
)

from nanovllm import LLM

PROMPTS = random_prompts((1, 2, 6, 7, 8, 15, 16, 17, 40, 90), 1536, seed=4)
PARAMS = varied((33, 1, 8, 2, 30, 17, 1, 16, 25, 12))
SMALL_POOLS = {size: smallest_pool(size, PROMPTS, PARAMS) for size in (1, 2, 7, 16, 256)}


@cache
def tokens_alone() -> list[list[int]]:
    """The tokens that each request gets when nothing else runs."""
    return alone(PROMPTS, PARAMS)


@pytest.mark.parametrize(
    ("block_size", "max_num_seqs"), [(1, 64), (2, 3), (7, 1), (7, 64), (16, 3), (256, 1), (256, 64)]
)
def test_block_size_and_batch_size_change_no_token(block_size, max_num_seqs):
    with engine(kvcache_block_size=block_size, max_num_seqs=max_num_seqs) as llm:
        assert tokens(llm, PROMPTS, PARAMS) == tokens_alone()
        assert tokens(llm, PROMPTS, PARAMS) == tokens_alone(), "in used blocks"


@pytest.mark.parametrize("spare", [0, 1])
@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 256])
def test_the_smallest_pool_gives_every_request_its_tokens(block_size, spare):
    num_blocks = SMALL_POOLS[block_size]["num_kvcache_blocks"] + spare
    with engine(kvcache_block_size=block_size, num_kvcache_blocks=num_blocks) as llm:
        assert tokens(llm, PROMPTS, PARAMS) == tokens_alone()


def test_the_order_of_the_requests_changes_no_token():
    with engine(**SMALL_POOLS[7]) as llm:
        assert tokens(llm, PROMPTS[::-1], PARAMS[::-1]) == tokens_alone()[::-1]


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_the_books_are_right_after_every_step(block_size):
    with engine(**SMALL_POOLS[block_size]) as llm:
        assert step_through(llm, PROMPTS, PARAMS) == tokens_alone()


def poison(llm: LLM, block_ids=slice(None)) -> None:
    """Fill blocks with numbers that would show in any token that they touched."""
    llm.model_runner.kv_cache[:, :, block_ids] = 1e4


@pytest.mark.parametrize("options", [dict(kvcache_block_size=7), SMALL_POOLS[16]], ids=str)
def test_what_lay_in_the_cache_before_is_not_read(options):
    with engine(**options) as llm:
        poison(llm)
        assert tokens(llm, PROMPTS, PARAMS) == tokens_alone()


@pytest.mark.parametrize("options", [dict(kvcache_block_size=7), SMALL_POOLS[16]], ids=str)
def test_what_lies_in_free_blocks_is_not_read(options):
    def poison_free_blocks(llm):
        check_books(llm)
        poison(llm, free_ids(block_manager(llm)))

    with engine(**options, **NO_PREFIX_CACHE) as llm:
        assert step_through(llm, PROMPTS, PARAMS, poison_free_blocks) == tokens_alone()


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_an_exception_frees_every_block(monkeypatch, exception, num_steps):
    def broken(*args):
        raise exception

    with engine(**SMALL_POOLS[7]) as llm:
        add_all(llm, PROMPTS, PARAMS)
        for _ in range(num_steps):
            llm.step()
        with monkeypatch.context() as patch:
            patch.setattr(llm.model_runner, "run", broken)
            with pytest.raises(exception):
                llm.step()
        check_empty(llm)
        assert tokens(llm, PROMPTS, PARAMS) == tokens_alone()


def test_aborted_requests_give_their_blocks_back():
    with engine(**SMALL_POOLS[7]) as llm:
        ids = add_all(llm, PROMPTS, PARAMS)
        llm.step()
        for number in (0, 9, 4, 8, 7):  # some run, some wait
            llm.abort(ids[number])
            check_books(llm)
        step_through(llm)
        assert tokens(llm, PROMPTS, PARAMS) == tokens_alone()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(kvcache_block_size=0), "kvcache_block_size.*0"),
        (dict(kvcache_block_size=-1), "kvcache_block_size.*-1"),
        (dict(kvcache_block_size=2.5), "kvcache_block_size.*2.5"),
        (dict(num_kvcache_blocks=0), "256 tokens.*num_kvcache_blocks=0"),
        (dict(num_kvcache_blocks=-2), "num_kvcache_blocks.*-2"),
        (dict(num_kvcache_blocks="many"), "num_kvcache_blocks.*many"),
        (dict(kvcache_block_size=2**40), f"{2**40} tokens.*num_kvcache_blocks="),
        (dict(kvcache_block_size=10**30), f"{10**30} tokens"),
        (dict(gpu_memory_utilization=0), "gpu_memory_utilization.*0"),
        (dict(gpu_memory_utilization=1.1), "gpu_memory_utilization.*1.1"),
        (dict(max_num_seqs=0), "max_num_seqs.*0"),
    ],
    ids=str,
)
def test_a_bad_cache_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        build(**options)


def test_a_request_that_can_never_fit_is_refused_and_nothing_is_left():
    """The pool holds 20 tokens: 15 and 5 fit, 15 and 6 do not."""
    fits, too_long = greedy(5), greedy(6)
    prompt, named = list(range(15)), "15.*max_tokens=6.*5 blocks of 4"
    with engine(kvcache_block_size=4, num_kvcache_blocks=5) as llm:
        before = tokens(llm, prompt, fits)
        assert len(before[0]) == 5
        for refused in (
            lambda: llm.add_request(prompt, too_long),
            lambda: llm.stream(prompt, too_long),
            lambda: llm.generate([prompt, prompt], [fits, too_long], use_tqdm=False),
        ):
            with pytest.raises(ValueError, match=named):
                refused()
            check_empty(llm)
        assert tokens(llm, prompt, fits) == before


def test_the_last_token_needs_no_slot_of_its_own():
    """A pool of one block, filled to its last slot."""
    prompt = list(range(7))
    (found,) = alone([prompt], [greedy(9)])
    with engine(kvcache_block_size=16, num_kvcache_blocks=1) as llm:
        assert tokens(llm, [prompt] * 3, greedy(9)) == [found] * 3

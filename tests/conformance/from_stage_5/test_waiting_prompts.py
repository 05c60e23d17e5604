"""When a prompt starts, and what it costs while it waits."""

from __future__ import annotations

import pytest
from memory import account, make_seq

from nanovllm.config import Config
from nanovllm.engine.scheduler import Scheduler

NUM_STEPS = 50
SIZE = 16


def step(scheduler: Scheduler) -> None:
    """One step whose sampled tokens are all 0."""
    seqs = scheduler.schedule()
    account(scheduler, seqs, [0] * len(seqs))


@pytest.mark.parametrize("num_known", [0, 1, 10, 30])
def test_a_blocked_prompt_is_hashed_once(hashed, num_known):
    """After the first step, at most the one block that was not found is looked for again."""
    text = range(1000, 1000 + 40 * SIZE)  # of which another request has computed a beginning
    others = [text[: num_known * SIZE] or [0], range(45 * SIZE)]
    num_blocks = max(num_known, 1) + 45 + 9  # the others will grow by 8; the text lacks 10 or more
    scheduler = Scheduler(Config(device="cpu", kvcache_block_size=SIZE), num_blocks, ())
    for number, prompt in enumerate(others):
        scheduler.add(make_seq(prompt, max_tokens=1000, seq_id=number))
    step(scheduler)
    hashed.clear()
    scheduler.add(make_seq(text, seq_id=2))
    step(scheduler)
    assert len(hashed) == num_known + 1, "each block that is known, and one more"
    hashed.clear()
    for _ in range(NUM_STEPS):
        step(scheduler)
    assert len(scheduler.waiting) == 1 and scheduler.num_preemptions == 0
    again = [block for block in hashed if block[0] in text]
    assert len(again) <= NUM_STEPS
    assert len(hashed) - len(again) <= 2 * (NUM_STEPS // SIZE + 1), "those that run: a block each"


def full_scheduler(*prompts: range) -> Scheduler:
    """A scheduler with 300 blocks that has run a step for each of these prompts."""
    config = Config(device="cpu", kvcache_block_size=SIZE)
    scheduler = Scheduler(config, 300, ())
    for number, prompt in enumerate(prompts):
        scheduler.add(make_seq(prompt, max_tokens=1000, seq_id=number))
        step(scheduler)
    return scheduler


@pytest.mark.parametrize("free", [20, 22, 23, 24])
def test_a_hundredth_of_the_pool_is_left_for_those_that_run(free):
    """Beside another, a prompt of 20 blocks starts where 3 of 300 stay free."""
    running, arriving = range((300 - free) * SIZE - 1), range(10**6, 10**6 + 20 * SIZE)
    scheduler = full_scheduler(running, arriving)
    assert len(scheduler.running) == (2 if free >= 23 else 1)


def test_alone_a_prompt_may_fill_the_pool():
    assert len(full_scheduler(range(300 * SIZE)).running) == 1

"""Many requests of mixed length go through a pool that holds a tenth of them at once.

`NANOVLLM_OPERATIONS=1` makes it 2,000 requests instead of 200.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
from functools import cache
from random import Random

import pytest
from checkpoints import random_prompts
from memory import NO_PREFIX_CACHE, alone, block_manager, check_empty, engine, hit_rate, varied

from nanovllm.engine.block import Prefix
from nanovllm.engine.sequence import Sequence

NUM_REQUESTS = 2000 if os.environ.get("NANOVLLM_OPERATIONS") else 200
BLOCK_SIZE = 16


@cache
def requests():
    """Prompts, a third of which begin with the same 70 tokens, and their parameters."""
    random = Random(0)
    lengths = [random.choice((1, 5, 16, 30, 60)) for _ in range(NUM_REQUESTS)]
    shared, *prompts = random_prompts((70, *lengths), 1536, seed=30)
    prompts = [shared + p if i % 3 == 0 else p for i, p in enumerate(prompts)]
    return prompts, varied(tuple(random.choice((1, 8, 20, 48)) for _ in prompts))


@cache
def expected() -> list[list[int]]:
    """What a roomy engine without the prefix cache makes of them."""
    prompts, params = requests()
    total = sum(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
    with engine(num_kvcache_blocks=total // 256 + NUM_REQUESTS, **NO_PREFIX_CACHE) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.scheduler.num_preemptions == 0
    return [out["token_ids"] for out in outputs]


def test_the_reference_is_what_requests_get_alone():
    prompts, params = requests()
    sample = Random(1).sample(range(NUM_REQUESTS), 20)
    found = alone([prompts[i] for i in sample], [params[i] for i in sample])
    assert found == [expected()[i] for i in sample]


@pytest.fixture
def traced():
    """Python's allocations are counted."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def alive(kind: type) -> int:
    """How many objects of a class there are."""
    gc.collect()
    return sum(type(obj) is kind for obj in gc.get_objects())


@pytest.mark.parametrize("budget", [16384, 48])
def test_many_requests_finish_each_with_its_own_tokens(traced, budget):
    """Nothing is left over: no block, no sequence, no entry of the cache, no memory."""
    prompts, params = requests()
    total = sum(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
    num_blocks = total // 10 // BLOCK_SIZE
    quarter, memory, before = NUM_REQUESTS // 4, [], alive(Sequence)
    with engine(
        kvcache_block_size=BLOCK_SIZE, num_kvcache_blocks=num_blocks, max_num_batched_tokens=budget
    ) as llm:
        for start in range(0, NUM_REQUESTS, quarter):
            part = slice(start, start + quarter)
            outputs = llm.generate(prompts[part], params[part], use_tqdm=False)
            assert [out["token_ids"] for out in outputs] == expected()[part]
            check_empty(llm)
            del outputs
            assert alive(Sequence) == before and alive(Prefix) <= num_blocks
            memory.append(tracemalloc.get_traced_memory()[0])
        assert hit_rate(block_manager(llm)) > 0.2
        assert llm.scheduler.num_preemptions > 0 or budget < 1000
    assert memory[3] - memory[1] < 100_000, f"{memory} bytes after each quarter"

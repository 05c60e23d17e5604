"""Padding is no address: a row whose blocks are gone neither writes nor reads anybody's.

A request can be cancelled after a step has listed it. Its row stays, since the others' places
depend on it, but its block table is empty.
"""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_prompts
from device import PLAIN
from memory import NO_PREFIX_CACHE, engine, greedy

from nanovllm.utils.context import get_context

SIZE = 4  # tokens in a block
PROMPTS = random_prompts((9, 6, 7, 1), 1536, seed=100)
OPTIONS = dict(kvcache_block_size=SIZE, num_kvcache_blocks=40, **NO_PREFIX_CACHE, **PLAIN)


def slots(table: list[int], first: int, stop: int) -> list[int]:
    """The slots of a span, those that the table has a block for."""
    held = range(first, min(stop, len(table) * SIZE))
    return [table[at // SIZE] * SIZE + at % SIZE for at in held]


def tokens(llm, prompts) -> list[list[int]]:
    outputs = llm.generate(prompts, greedy(6), use_tqdm=False)
    return [out["token_ids"] for out in outputs]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What each request gets alone."""
    with engine(**OPTIONS) as llm:
        return [tokens(llm, [prompt])[0] for prompt in PROMPTS]


def watch(llm, monkeypatch, number: int, victim: list[int], kept: int) -> list[dict]:
    """What each step is given, and what it writes.

    In step `number` the request with the prompt `victim` has its first `kept` blocks alone.
    """
    steps, run, forward = [], llm.model_runner.run, llm.model_runner.model.forward

    def looking(*args):
        context = get_context()
        steps[-1]["tables"] = context.block_tables.tolist()
        steps[-1]["mapped"] = context.slot_mapping.tolist()
        return forward(*args)

    def watched(seqs):
        (seq,) = (seq for seq in seqs if seq.token_ids[: seq.num_prompt_tokens] == victim)
        table, pool = seq.block_table, llm.model_runner.kv_cache[:, :, : llm.limits.num_blocks]
        if len(steps) == number:
            seq.block_table = table[:kept]
        before, own = pool.clone(), set()
        for other in seqs:
            first = other.num_computed_tokens
            count = getattr(other, "num_scheduled_tokens", len(other) - first)
            own.update(slots(other.block_table, first, first + count))
        steps.append(dict(own=own, owned=[list(other.block_table) for other in seqs]))
        result = run(seqs)
        changed = (pool != before).flatten(4).any(4).flatten(2, 3)  # [2, layers, slots]
        parts = changed.flatten(0, 1)
        steps[-1]["written"] = [set(part.nonzero().flatten().tolist()) for part in parts]
        seq.block_table = table
        return result

    monkeypatch.setattr(llm.model_runner.model, "forward", looking)
    monkeypatch.setattr(llm.model_runner, "run", watched)
    return steps


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [0, 3])
def test_a_row_without_its_blocks_leaves_the_others_alone(
    monkeypatch, expected, number, victim, kept
):
    """A prompt's row, or a decode's: the others get their tokens, and write their own slots."""
    with engine(**OPTIONS) as llm:
        cache = llm.model_runner.kv_cache
        cache.normal_(generator=torch.Generator(cache.device).manual_seed(0))
        steps = watch(llm, monkeypatch, number, PROMPTS[victim], kept)
        found = tokens(llm, PROMPTS)
    others = [i for i in range(len(PROMPTS)) if i != victim]
    assert [found[i] for i in others] == [expected[i] for i in others]
    for step in steps:
        assert all(written == step["own"] for written in step["written"])
        assert {slot for slot in step["mapped"] if slot >= 0} == step["own"]
        assert min(step["mapped"]) >= -1
        for padded, table in zip(step["tables"], step["owned"], strict=True):
            held = min(len(table), len(padded))
            assert padded[:held] == table[:held] and set(padded[held:]) <= {-1}

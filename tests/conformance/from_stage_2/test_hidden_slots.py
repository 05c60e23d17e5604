"""What a request does not see can't change its tokens: not even a NaN in another's blocks."""

from __future__ import annotations

import math

import pytest
import torch
from checkpoints import random_prompts
from device import build, offered

from nanovllm import LLM, SamplingParams

PROMPTS = random_prompts((40, 3, 17, 1, 9), 1536, seed=80)  # the first is the longest
NUM_TOKENS = 6
POOL = offered(kvcache_block_size=16, num_kvcache_blocks=40, attention_backend="torch")


def slots(llm: LLM, row: int, seq) -> list[int]:
    """Where the tokens that a sequence has computed lie."""
    runner, places = llm.model_runner, range(seq.num_computed_tokens)
    if not hasattr(seq, "block_table"):  # chapter 2: a row a sequence
        return [row * runner.row_len + i for i in places]
    size = runner.block_size
    return [seq.block_table[i // size] * size + i % size for i in places]


def tokens_with_poison(params: list[SamplingParams], victims: set[int]) -> list[list[int]]:
    """What each request samples while, before each step, NaN fills the cache.

    It is in all slots but those of the step's sequences that are no victims. A sampled -1 is
    noted, and handed on as 0.
    """
    llm = build(dtype="float32", **POOL)
    runner, run = llm.model_runner, llm.model_runner.run
    sampled: dict[int, list[int]] = {}

    def poisoned(seqs):
        with torch.inference_mode():
            if any(seq.num_computed_tokens for seq in seqs):
                cache = runner.kv_cache.flatten(2, 3)  # [2, layers, slots, heads, channels]
                hidden = torch.ones(cache.shape[2], dtype=torch.bool)
                for row, seq in enumerate(seqs):
                    if seq.seq_id not in victims:
                        hidden[slots(llm, row, seq)] = False
                cache[:, :, hidden.to(cache.device)] = math.nan
            result = run(seqs)
            found = result if isinstance(result, list) else result.token_ids()
            for seq, token in zip(seqs, found, strict=True):
                sampled.setdefault(seq.seq_id, []).append(token)
            if not isinstance(result, list):
                result.sampled.clamp_(min=0)
                return result
            return [max(token, 0) for token in result]

    runner.run = poisoned
    llm.generate(PROMPTS, params, use_tqdm=False)
    llm.exit()
    return [sampled[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("victims", [set(), {0}, {0, 3}], ids=str)
def test_nan_in_slots_that_are_not_its_own_changes_no_request(victims, temperature):
    """Tables are padded and contexts differ in length, so such slots are read."""
    filters = [dict(), dict(top_k=20), dict(), dict(top_p=0.9), dict()]
    options = dict(temperature=temperature, seed=4, max_tokens=NUM_TOKENS, ignore_eos=True)
    params = [SamplingParams(**options, **kind) for kind in filters]
    llm = build(dtype="float32", **POOL)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.exit()
    found = tokens_with_poison(params, victims)
    for i, output in enumerate(outputs):
        if i in victims:
            assert found[i] == output["token_ids"][:1] + [-1] * (NUM_TOKENS - 1)
        else:
            assert found[i] == output["token_ids"]

"""The torch attention over blocks equals dense attention; kernels are measured against it."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from nanovllm.layers.attention import paged_attention
from nanovllm.utils.context import Context

HAS_KERNELS = find_spec("nanovllm.kernels") is not None  # from chapter 6 on
if HAS_KERNELS:
    from nanovllm.kernels.store_kvcache import store_kvcache
else:
    from nanovllm.layers.attention import store_kvcache

GARBAGE = math.nan  # in every slot that no token owns


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last `len(q)` tokens of one text attend to those before; in float64, head by head."""
    q, k, v = q.double(), k.double(), v.double()
    out, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    first = len(k) - len(q)
    for row in range(len(q)):
        seen = first + row + 1
        for head in range(q.shape[1]):
            scores = k[:seen, head // group] @ q[row, head] * scale
            out[row, head] = scores.softmax(0) @ v[:seen, head // group]
    return out.float()


def scattered(
    spans: list[tuple[int, int]], block_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, Context, Tensor]:
    """Random texts in blocks that lie in random order: q, the caches, the context, the answer.

    A span (num_new, num_tokens) is a text whose last `num_new` tokens are asked for; those that
    bring one token come first.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    needed = [-(-num_tokens // block_size) for _, num_tokens in spans]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    shape = (len(order), block_size, num_kv_heads, head_dim)
    k_cache, v_cache = torch.full(shape, GARBAGE), torch.full(shape, -GARBAGE)
    queries, tables, slots, expected = [], [], [], []
    for (num_new, num_tokens), num_blocks in zip(spans, needed, strict=True):
        table, order = order[:num_blocks], order[num_blocks:]
        q = random(num_new, num_heads, head_dim)
        k, v = (random(num_tokens, num_kv_heads, head_dim) for _ in range(2))
        at = [table[i // block_size] * block_size + i % block_size for i in range(num_tokens)]
        store_kvcache(k, v, k_cache, v_cache, torch.tensor(at))
        queries.append(q)
        tables.append(table)
        slots += at[-num_new:]
        expected.append(dense(q, k, v, head_dim**-0.5))
    ends = torch.tensor([num_new for num_new, _ in spans]).cumsum(0).tolist()
    lens = [num_tokens for _, num_tokens in spans]
    num_decodes = sum(num_new == 1 for num_new, _ in spans)
    context = Context(
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor([t + [0] * (max(needed) - len(t)) for t in tables]),
        context_lens=torch.tensor(lens),
        cu_seqlens=torch.tensor([0, *ends]),
        num_decodes=num_decodes,
    )
    return torch.cat(queries), k_cache, v_cache, context, torch.cat(expected)


def check(spans: list[tuple[int, int]], *shape: int) -> None:
    """Paged attention gives the answer of dense attention."""
    q, k_cache, v_cache, context, expected = scattered(spans, *shape)
    found = paged_attention(q, k_cache, v_cache, context, shape[-1] ** -0.5)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def around(block_size: int) -> list[int]:
    """Lengths about the edges of blocks."""
    edges = [edge * block_size + offset for edge in (1, 2, 3) for offset in (-1, 0, 1)]
    return sorted({1, 2} | {length for length in edges if length > 0})


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_decode_equals_dense_attention(block_size, group, head_dim):
    spans = [(1, length) for length in around(block_size)]
    check(spans, block_size, 4, 4 // group, head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_whole_prompts_equal_dense_attention(block_size, group, head_dim):
    spans = [(length, length) for length in around(block_size) if length > 1]
    check(spans, block_size, 4, 4 // group, head_dim)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_the_rest_of_a_prompt_equals_dense_attention(block_size, group):
    """Where what stands before the new tokens ends at, before and behind an edge."""
    spans = [(new, old + new) for old in around(block_size) for new in (2, block_size + 1)]
    check(spans, block_size, 4, 4 // group, 64)


@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_decodes_and_prompts_share_a_batch(block_size):
    lengths = around(block_size)
    spans = [(1, length) for length in lengths] + [(5, length + 5) for length in lengths]
    check(spans, block_size, 4, 2, 64)


@pytest.mark.parametrize("length", [1, 6, 7, 8])
def test_decodes_of_one_length_equal_dense_attention(length):
    check([(1, length)] * 3, 7, 4, 2, 64)
    check([(1, length)] * 3 + [(5, 12)], 7, 4, 2, 64)


def test_one_sequence_in_one_block():
    check([(1, 1)], 256, 2, 1, 64)
    check([(256, 256)], 256, 2, 1, 64)


def test_only_the_given_slots_are_written():
    k_cache, v_cache = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8)
    k, v = torch.ones(3, 2, 8), torch.full((3, 2, 8), 2.0)
    store_kvcache(k, v, k_cache, v_cache, torch.tensor([5, 0, 10]))
    for cache, value in ((k_cache, 1), (v_cache, 2)):
        filled = cache.flatten(0, 1).flatten(1)
        assert filled.eq(value).all(1).nonzero().flatten().tolist() == [0, 5, 10]
        assert filled.eq(0).all(1).sum() == 9


def test_slot_minus_one_is_nobodys():
    """It is in the last block, which the runner keeps out of the pool; from 6 on it is nowhere."""
    caches, ones = torch.zeros(2, 3, 4, 2, 8), torch.ones(1, 2, 8)
    store_kvcache(ones, ones, *caches, torch.tensor([-1]))
    assert caches[:, :2].eq(0).all()
    assert caches[:, 2].any() != HAS_KERNELS

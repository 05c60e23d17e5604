"""Attention of many new tokens a sequence over its blocks: whole prompts, chunks, mixed steps."""

import torch

from nanovllm.kernels.attention_tile import LOG2_E, take_scores, tile_slots
from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs
from nanovllm.kernels.prefill_hopper import prefill_hopper, takes_hopper


@triton.jit
def prefill_tile(
    best, total, mean, queries, k_cache, v_cache, table, at, position, context_len, kv_head, scale,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running maximum, sum and mean of each query row."""
    channel, column = tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    slot = tile_slots(table, at, context_len, BLOCK_SIZE, TILE)
    where = (slot[:, None] * NUM_KV_HEADS + kv_head) * HEAD_DIM + channel[None, :]
    if MASKED:
        there = (at + column < context_len)[:, None]
        keys = tl.load(k_cache + where, mask=there, other=0.0)
        values = tl.load(v_cache + where, mask=there, other=0.0)
    else:
        keys = tl.load(k_cache + where)
        values = tl.load(v_cache + where)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(at + column[None, :] <= position[:, None], scores, -float("inf"))
    best, total, mean, probs = take_scores(best, total, mean, scores)
    mean = tl.dot(probs.to(values.dtype), values, mean, input_precision="ieee")
    return best, total, mean


@triton.jit
def prefill_rows(
    queries, k_cache, v_cache, table, position, first, stop, context_len, kv_head, scale,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M rows, at positions from `first` to before `stop`, see of a context: its mean."""
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    seen_by_all = (first + 1) // TILE * TILE
    for at in range(0, seen_by_all, TILE):
        best, total, mean = prefill_tile(
            best, total, mean, queries, k_cache, v_cache, table, at, position, context_len,
            kv_head, scale, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, TILE, False,
        )  # fmt: skip
    for at in range(seen_by_all, stop, TILE):
        best, total, mean = prefill_tile(
            best, total, mean, queries, k_cache, v_cache, table, at, position, context_len,
            kv_head, scale, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, TILE, True,
        )  # fmt: skip
    return mean / total[:, None]


@triton.jit(do_not_specialize=["table_stride", "first_seq"])
def prefill_kernel(
    out, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, scale, table_stride,
    first_seq,
    BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence, query head and BLOCK_M of its new tokens; the longest rows first."""
    head, seq = tl.program_id(0), first_seq + tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    wait_for_inputs(PDL)
    begin = tl.load(cu_seqlens + seq)
    num_new = tl.load(cu_seqlens + seq + 1) - begin
    if first < num_new:
        context_len = tl.load(context_lens + seq)
        row, channel = first + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
        q_row = ((begin + row).to(tl.int64)[:, None] * NUM_HEADS + head) * HEAD_DIM
        q_row += channel[None, :]
        is_new = row[:, None] < num_new
        before = context_len - num_new
        mean = prefill_rows(
            tl.load(q + q_row, mask=is_new, other=0.0), k_cache, v_cache,
            block_tables + seq.to(tl.int64) * table_stride, before + row, before + first,
            tl.minimum(before + first + BLOCK_M, context_len), context_len,
            head // (NUM_HEADS // NUM_KV_HEADS), scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, BLOCK_M, TILE,
        )  # fmt: skip
        tl.store(out + q_row, mean.to(out.dtype.element_ty), mask=is_new)


BLOCK_M = 64  # query rows in a program


def paged_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_new: int,
    scale: float,
    out: torch.Tensor | None = None,
    first_seq: int = 0,
) -> torch.Tensor:
    """FlashAttention (Dao et al. 2022) with causal mask over a paged cache.

    q: [num_tokens, num_heads, head_dim] -> `out`, the same shape; sequence i owns the tokens
    [cu_seqlens[i], cu_seqlens[i + 1]), the last ones of its context_lens[i]; at most `max_new`.
    k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim]; block_tables: [num_seqs,
    max_blocks]; context_lens, cu_seqlens: int32. The sequences before `first_seq` are left out.
    (A slice would do that too, but a kernel is compiled anew for an address aligned otherwise.)
    """
    out, pdl = torch.empty_like(q) if out is None else out, overlaps(q)
    inputs = q, k_cache, v_cache, block_tables, context_lens, cu_seqlens
    if takes_hopper(q, k_cache, v_cache, max_new, len(block_tables) - first_seq):
        return prefill_hopper(out, *inputs, max_new, scale * LOG2_E, first_seq)
    (num_heads, head_dim), (block_size, num_kv_heads) = q.shape[1:], k_cache.shape[1:3]
    tile, stages = (32, 1) if q.element_size() == 4 else (64, 2)
    prefill_kernel[num_heads, triton.cdiv(max_new, BLOCK_M), len(block_tables) - first_seq](
        out, *inputs, scale * LOG2_E, block_tables.stride(0), first_seq,
        BLOCK_SIZE=block_size, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_M=BLOCK_M, TILE=tile, PDL=pdl, launch_pdl=pdl, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out

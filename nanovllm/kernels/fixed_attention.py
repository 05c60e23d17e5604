"""Attention that gives a token the same bits whatever other tokens come with it."""

import torch

from nanovllm.kernels.attention_tile import LOG2_E
from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs
from nanovllm.kernels.prefill_attention import prefill_rows


@triton.jit(do_not_specialize=["table_stride", "first_seq"])
def fixed_attention_kernel(
    out, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, scale, table_stride,
    first_seq,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence, a key head and some of its new tokens, with a row for each query."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    kv_head, seq = tl.program_id(0), first_seq + tl.program_id(2)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * TOKENS
    wait_for_inputs(PDL)
    begin, context_len = tl.load(cu_seqlens + seq), tl.load(context_lens + seq)
    num_new = tl.load(cu_seqlens + seq + 1) - begin
    if (first < num_new) & (context_len > 0):
        row, channel = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
        token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
        is_new = ((row < TOKENS * GROUP) & (token < num_new))[:, None]
        q_row = ((begin + token).to(tl.int64) * (GROUP * NUM_KV_HEADS) + head)[:, None] * HEAD_DIM
        q_row += channel[None, :]
        before = context_len - num_new
        mean = prefill_rows(
            tl.load(q + q_row, mask=is_new, other=0.0), k_cache, v_cache,
            block_tables + seq.to(tl.int64) * table_stride, before + token, before + first,
            tl.minimum(before + first + TOKENS, context_len), context_len, kv_head, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, BLOCK_M, TILE,
        )  # fmt: skip
        tl.store(out + q_row, mean.to(out.dtype.element_ty), mask=is_new)


FEW_ROWS, ROWS = 16, 64  # in a program: for decodes, and for prompts
TILE = 64  # tokens of the context


def fixed_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_new: int,
    scale: float,
    out: torch.Tensor,
    first_seq: int = 0,
) -> torch.Tensor:
    """`paged_prefill_attention`, of which each row depends on its own text alone, to the last bit.

    The arguments are the same; decodes are sequences that bring one token.
    """
    (num_heads, head_dim), (block_size, num_kv_heads) = q.shape[1:], k_cache.shape[1:3]
    group, pdl = num_heads // num_kv_heads, overlaps(q)
    if q.element_size() == 4:  # no matrix unit takes float32: the order depends on the tile
        rows, tile, stages = 16, 32, 1
    else:
        rows, tile, stages = FEW_ROWS if max_new == 1 else ROWS, TILE, 2
    rows = max(rows, triton.next_power_of_2(group))
    grid = num_kv_heads, triton.cdiv(max_new, rows // group), len(block_tables) - first_seq
    fixed_attention_kernel[grid](
        out, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, scale * LOG2_E,
        block_tables.stride(0), first_seq, BLOCK_SIZE=block_size, NUM_KV_HEADS=num_kv_heads,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_M=rows, TILE=tile, PDL=pdl, launch_pdl=pdl,
        num_warps=4, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out

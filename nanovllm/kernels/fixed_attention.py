"""Attention that gives a token the same bits whatever other tokens come with it."""

import torch

from nanovllm.kernels.attention_tile import LOG2_E, tile_slots
from nanovllm.kernels.decode_attention import room_for_parts, splits_for
from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs


@triton.jit
def fixed_tile(
    queries, k_cache, v_cache, table, at, position, context_len, kv_head, scale,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What each row sees of the keys from `at` on: the maximum, the sum, the values; from zero."""
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
    best = tl.max(scores, axis=1)
    probs = tl.exp2(scores - tl.where(best > -float("inf"), best, 0.0)[:, None])
    mean = tl.dot(probs.to(values.dtype), values, input_precision="ieee")
    return best, tl.sum(probs, axis=1), mean


@triton.jit
def take_tile(best, total, mean, tile_best, tile_total, tile_mean):
    """The running maximum, sum and values of each row, after one more tile."""
    new_best = tl.maximum(best, tile_best)
    old, new = tl.exp2(best - new_best), tl.exp2(tile_best - new_best)
    return new_best, total * old + tile_total * new, mean * old[:, None] + tile_mean * new[:, None]


@triton.jit
def fixed_rows(
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
        b, t, m = fixed_tile(
            queries, k_cache, v_cache, table, at, position, context_len, kv_head, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, TILE, False,
        )  # fmt: skip
        best, total, mean = take_tile(best, total, mean, b, t, m)
    for at in range(seen_by_all, stop, TILE):
        b, t, m = fixed_tile(
            queries, k_cache, v_cache, table, at, position, context_len, kv_head, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, TILE, True,
        )  # fmt: skip
        best, total, mean = take_tile(best, total, mean, b, t, m)
    return mean / total[:, None]


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
        mean = fixed_rows(
            tl.load(q + q_row, mask=is_new, other=0.0), k_cache, v_cache,
            block_tables + seq.to(tl.int64) * table_stride, before + token, before + first,
            tl.minimum(before + first + TOKENS, context_len), context_len, kv_head, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, BLOCK_M, TILE,
        )  # fmt: skip
        tl.store(out + q_row, mean.to(out.dtype.element_ty), mask=is_new)


AHEAD = tl.constexpr(8)  # tiles that are read at a time


@triton.jit
def join_tiles(
    out, bests, totals, means, item, num_items, num_tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """Take in the tiles that several programs have left, one after another: the mean."""
    head, channel = tl.arange(0, GROUP_ROWS), tl.arange(0, HEAD_DIM)
    best = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    mean = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
    for first in range(0, num_tiles, AHEAD):
        for i in tl.static_range(AHEAD):
            place = (tl.cast(first + i, tl.int64) * num_items + item) * GROUP + head
            there, where = (head < GROUP) & (first + i < num_tiles), place[:, None] * HEAD_DIM
            b = tl.load(bests + place, mask=there, other=-float("inf"), cache_modifier=".cg")
            t = tl.load(totals + place, mask=there, other=0.0, cache_modifier=".cg")
            where += channel[None, :]
            m = tl.load(means + where, mask=there[:, None], other=0.0, cache_modifier=".cg")
            best, total, mean = take_tile(best, total, mean, b, t, m)
    where = (item.to(tl.int64) * GROUP + head[:, None]) * HEAD_DIM + channel[None, :]
    tl.store(out + where, (mean / total[:, None]).to(out.dtype.element_ty), (head < GROUP)[:, None])


@triton.jit(do_not_specialize=["table_stride"])
def fixed_decode_kernel(
    out, bests, totals, means, counters, q, k_cache, v_cache, block_tables, context_lens, scale,
    table_stride,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence that brings one token, a key head and some tiles of its context."""
    item, split, num_splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    seq, kv_head = item // NUM_KV_HEADS, item % NUM_KV_HEADS
    context_len = tl.load(context_lens + seq)
    num_tiles = tl.cdiv(context_len, TILE)
    if split >= num_tiles:
        return
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    is_head, q_row = row < GROUP, (item.to(tl.int64) * GROUP + row)[:, None] * HEAD_DIM
    table, position = block_tables + seq.to(tl.int64) * table_stride, row * 0 + context_len - 1
    wait_for_inputs(PDL)
    queries = tl.load(q + q_row + channel[None, :], mask=is_head[:, None], other=0.0)
    for tile in range(split, num_tiles, num_splits):
        best, total, mean = fixed_tile(
            queries, k_cache, v_cache, table, tile * TILE, position, context_len, kv_head, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, TILE, True,
        )  # fmt: skip
        place = (tl.cast(tile, tl.int64) * tl.num_programs(0) + item) * GROUP + row
        tl.store(bests + place, best, mask=is_head)
        tl.store(totals + place, total, mask=is_head)
        where = place[:, None] * HEAD_DIM + channel[None, :]
        tl.store(means + where, mean, mask=is_head[:, None])
    tl.debug_barrier()  # all of these are written before they are counted
    if tl.atomic_add(counters + item, 1, sem="acq_rel") == tl.minimum(num_splits, num_tiles) - 1:
        tl.store(counters + item, 0)
        join_tiles(
            out, bests, totals, means, item, tl.num_programs(0), num_tiles, GROUP, HEAD_DIM,
            GROUP_ROWS,
        )  # fmt: skip


def tile_for(q: torch.Tensor) -> tuple[int, int, int]:
    """Rows and tokens of the context in a tile, and how many are read at a time: for any batch."""
    return (16, 32, 1) if q.element_size() == 4 else (64, 64, 2)


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
    rows, tile, stages = tile_for(q)
    rows = max(rows, triton.next_power_of_2(group))
    grid = num_kv_heads, triton.cdiv(max_new, rows // group), len(block_tables) - first_seq
    fixed_attention_kernel[grid](
        out, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, scale * LOG2_E,
        block_tables.stride(0), first_seq, BLOCK_SIZE=block_size, NUM_KV_HEADS=num_kv_heads,
        GROUP=group, HEAD_DIM=head_dim, BLOCK_M=rows, TILE=tile, PDL=pdl, launch_pdl=pdl,
        num_warps=4, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out


MOST_BYTES = 64 << 20  # for what is left of the tiles


def fixed_decode(
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fixed_attention` of sequences that bring one token each, the first ones of q.

    caches: k_cache and v_cache; counters: as in `paged_decode_attention`.
    """
    block_size, num_kv_heads, head_dim = caches[0].shape[1:]
    (rows, tile, stages), group, pdl = tile_for(q), q.shape[1] // num_kv_heads, overlaps(q)
    items, max_tiles = len(block_tables) * num_kv_heads, block_tables.shape[1] * block_size // tile
    splits = splits_for(items, q.device)
    if splits == 1 or 4 * items * max_tiles * group * head_dim > MOST_BYTES:
        lens = context_lens, cu_seqlens
        return fixed_attention(q, *caches, block_tables, *lens, 1, scale, out)
    means, bests, counters = room_for_parts(q, max_tiles + 1, items, group, counters)
    fixed_decode_kernel[items, splits](
        out, bests, torch.empty_like(bests), means, counters, q, *caches, block_tables,
        context_lens, scale * LOG2_E, block_tables.stride(0), BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim,
        ROWS=max(rows, triton.next_power_of_2(group)), GROUP_ROWS=triton.next_power_of_2(group),
        TILE=tile, PDL=pdl, launch_pdl=pdl, num_warps=4, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out

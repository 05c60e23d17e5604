"""Attention of one new token a sequence over its blocks, split over the context."""

import torch

from nanovllm.kernels.attention_tile import LOG2_E, take_scores, tile_slots
from nanovllm.kernels.jit import num_processors, overlaps, tl, triton, wait_for_inputs


@triton.jit
def decode_tile(
    best, total, mean, queries, k_cache, v_cache, table, at, stop, kv_head, scale,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The keys and values from `at` on into the running maximum, sum and mean of each row."""
    channel, there = tl.arange(0, HEAD_DIM), at + tl.arange(0, TILE) < stop
    slot = tile_slots(table, at, stop, BLOCK_SIZE, TILE)
    where = (slot[:, None] * NUM_KV_HEADS + kv_head) * HEAD_DIM + channel[None, :]
    keys = tl.load(k_cache + where, mask=there[:, None], other=0.0)
    values = tl.load(v_cache + where, mask=there[:, None], other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(there[None, :], scores, -float("inf"))
    best, total, mean, probs = take_scores(best, total, mean, scores)
    mean += tl.dot(probs.to(values.dtype), values, input_precision="ieee")
    return best, total, mean


@triton.jit
def decode_part(
    queries, k_cache, v_cache, table, start, stop, kv_head, scale,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each row's maximum, sum and mean over the tokens from `start` up to `stop`."""
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for at in range(start, stop, TILE):
        best, total, mean = decode_tile(
            best, total, mean, queries, k_cache, v_cache, table, at, stop, kv_head, scale,
            BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, TILE,
        )  # fmt: skip
    return best, total, mean / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def part_bounds(context_len, split, num_splits, TILE: tl.constexpr):
    """Where part `split` of a context begins and ends, and how many parts are used: at least 1."""
    per_split = tl.cdiv(tl.cdiv(context_len, TILE), num_splits) * TILE
    used = tl.cdiv(context_len, tl.maximum(per_split, 1))
    start = split * per_split
    return start, tl.minimum(start + per_split, context_len), tl.maximum(used, 1)


@triton.jit
def store_part(
    partial, lse, at, best, total, mean,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A part's mean, and the logarithm of its sum, which weighs it; -inf where it saw nothing."""
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    where = (at + row[:, None]).to(tl.int64) * HEAD_DIM + channel[None, :]
    tl.store(partial + where, mean, mask=row[:, None] < GROUP)
    weight = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(lse + at + row, weight, mask=row < GROUP)


@triton.jit
def join_parts(
    out, partial, lse, item, num_rows, used,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The mean of the parts' means, by their weights, PARTS at a time."""
    head, channel = tl.arange(0, GROUP_ROWS), tl.arange(0, HEAD_DIM)
    best = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    mean = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
    for first in range(0, used, PARTS):
        part = first + tl.arange(0, PARTS)
        source = (part[:, None] * num_rows + item) * GROUP + head[None, :]
        mask = (part[:, None] < used) & (head[None, :] < GROUP)
        weights = tl.load(lse + source, mask=mask, other=-float("inf"), cache_modifier=".cg")
        means = tl.load(
            partial + source[:, :, None].to(tl.int64) * HEAD_DIM + channel[None, None, :],
            mask=mask[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_best = tl.maximum(best, tl.max(weights, axis=0))
        safe = tl.where(new_best > -float("inf"), new_best, 0.0)
        shrink = tl.exp2(best - safe)
        weights = tl.exp2(weights - safe[None, :])
        total = total * shrink + tl.sum(weights, axis=0)
        mean = mean * shrink[:, None] + tl.sum(means * weights[:, :, None], axis=0)
        best = new_best
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]
    where = (item.to(tl.int64) * GROUP + head[:, None]) * HEAD_DIM + channel[None, :]
    tl.store(out + where, mean.to(out.dtype.element_ty), mask=head[:, None] < GROUP)


@triton.jit(do_not_specialize=["table_stride", "num_splits"])
def decode_kernel(
    out, partial, lse, counters, q, k_cache, v_cache, block_tables, context_lens, order, scale,
    table_stride, num_splits,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr, TILE: tl.constexpr,
    IS_SPLIT: tl.constexpr, IS_ORDERED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence, key head and part of the context: GROUP query heads as rows."""
    seq, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    split, num_rows = tl.program_id(1), tl.num_programs(0)
    if IS_ORDERED:
        seq = tl.load(order + seq)
    item = seq * NUM_KV_HEADS + kv_head
    start, stop, used = part_bounds(tl.load(context_lens + seq), split, num_splits, TILE)
    if split >= used:
        return
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    q_row, is_head = (item.to(tl.int64) * GROUP + row) * HEAD_DIM + channel, row < GROUP
    table = block_tables + seq.to(tl.int64) * table_stride
    wait_for_inputs(PDL)
    best, total, mean = decode_part(
        tl.load(q + q_row, mask=is_head, other=0.0), k_cache, v_cache, table, start, stop, kv_head,
        scale, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, ROWS, TILE,
    )  # fmt: skip
    if not IS_SPLIT:
        tl.store(out + q_row, mean.to(out.dtype.element_ty), mask=is_head)
    else:
        at = (split * num_rows + item) * GROUP
        store_part(partial, lse, at, best, total, mean, GROUP, HEAD_DIM, ROWS)
        tl.debug_barrier()  # all of this part is written before it is counted
        if tl.atomic_add(counters + item, 1, sem="acq_rel") >= used - 1:
            tl.store(counters + item, 0)
            join_parts(out, partial, lse, item, num_rows, used, GROUP, HEAD_DIM, GROUP_ROWS, PARTS)


def splits_for(rows: int, device: torch.device) -> int:
    """1 where every multiprocessor has two programs without; else so many that it has four."""
    processors = num_processors(device)
    return 1 if rows >= 2 * processors else min(processors // 2, 4 * processors // rows)


def room_for_parts(
    q: torch.Tensor, splits: int, rows: int, group: int, counters: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory for the parts' means and weights, and counters for `rows` contexts."""
    partial = q.new_empty((splits, rows, group, q.shape[2]), dtype=torch.float32)
    lse = q.new_empty((splits, rows, group), dtype=torch.float32)
    if counters is None or len(counters) < rows:
        counters = q.new_zeros(rows, dtype=torch.int32)
    return partial, lse, counters


def launch_decode(
    out: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    order: torch.Tensor | None,
    scale: float,
    splits: int,
) -> None:
    """Launch `decode_kernel`, whose arguments `paged_decode_attention` has made up."""
    block_size, num_kv_heads, head_dim = caches[0].shape[1:]
    group, pdl = q.shape[1] // num_kv_heads, overlaps(q)
    group_rows = triton.next_power_of_2(group)
    # Measured: small tiles, for more parts, where a few sequences have the chip to themselves;
    # but for one or two of them no more parts than are joined soon.
    tile, stages = (64, 3) if splits <= 4 and q.element_size() == 2 else (32, 2)
    if splits > 32 and group_rows * head_dim >= 512 and q.element_size() == 2:
        tile = 64
    decode_kernel[len(block_tables) * num_kv_heads, splits](
        out, *parts, q, *caches, block_tables, context_lens,
        context_lens if order is None else order, scale * LOG2_E, block_tables.stride(0), splits,
        BLOCK_SIZE=block_size, NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim,
        ROWS=max(16, group_rows), GROUP_ROWS=group_rows, TILE=tile, IS_SPLIT=splits > 1,
        IS_ORDERED=order is not None, PARTS=max(1, min(32, 8192 // (group_rows * head_dim))),
        PDL=pdl, launch_pdl=pdl, num_warps=2, num_stages=stages,
    )  # fmt: skip


def paged_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    num_splits: int | None = None,
    order: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Flash-decoding (Dao et al. 2023) over a paged cache.

    q: [num_tokens, num_heads, head_dim], of which the first num_seqs are looked at -> `out`, the
    same shape; k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], the last a power
    of two; block_tables: [num_seqs, max_blocks]; context_lens: [num_seqs] int32, 0 for padding,
    whose output is 0. `order`: [num_seqs] int32, in which to begin. It and the lengths are read
    early: see `wait_for_inputs`. `counters`: zeros, [num_seqs * num_kv_heads] int32 or more, left
    zero; calls that share them must not overlap.
    """
    num_kv_heads = k_cache.shape[2]
    rows, group = len(block_tables) * num_kv_heads, q.shape[1] // num_kv_heads
    splits = splits_for(rows, q.device) if num_splits is None else num_splits
    out = torch.empty_like(q) if out is None else out
    parts, caches = (out, out, context_lens), (k_cache, v_cache)  # unused where nothing is split
    if splits > 1:
        parts, order = room_for_parts(q, splits, rows, group, counters), None
    launch_decode(out, parts, q, caches, block_tables, context_lens, order, scale, splits)
    return out

"""Attention of one new token a sequence over its blocks, split over the context."""

import torch

from nanovllm.kernels.jit import num_processors, overlaps, tl, triton, wait_for_inputs


@triton.jit
def decode_tile(
    best, total, mean, queries, k_cache, v_cache, table, at, stop, kv_head, scale,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The keys and values from `at` on into the running maximum, sum and mean of each row."""
    channel, column = tl.arange(0, HEAD_DIM), tl.arange(0, TILE)
    there = at + column < stop  # a block of -1 is no address: such a row reads what exists
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block
        block = tl.load(table + at // BLOCK_SIZE).to(tl.int64)
        slot = tl.maximum(block, 0) * BLOCK_SIZE + at % BLOCK_SIZE + column
    else:
        place = at + column
        block = tl.load(table + place // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        slot = tl.maximum(block, 0) * BLOCK_SIZE + place % BLOCK_SIZE
    where = (slot[:, None] * NUM_KV_HEADS + kv_head) * HEAD_DIM + channel[None, :]
    keys = tl.load(k_cache + where, mask=there[:, None], other=0.0)
    values = tl.load(v_cache + where, mask=there[:, None], other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(there[None, :], scores, -float("inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    shrink = tl.exp2(best - new_best)
    probs = tl.exp2(scores - new_best[:, None])
    total = total * shrink + tl.sum(probs, axis=1)
    mean = mean * shrink[:, None]
    mean += tl.dot(probs.to(values.dtype), values, input_precision="ieee")
    return new_best, total, mean


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


CHUNK = tl.constexpr(32)  # parts that are joined at a time


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
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """The mean of the parts' means, by their weights, CHUNK parts at a time."""
    head, channel = tl.arange(0, GROUP_ROWS), tl.arange(0, HEAD_DIM)
    best = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    mean = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
    for first in range(0, used, CHUNK):
        part = first + tl.arange(0, CHUNK)
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
    IS_SPLIT: tl.constexpr, IS_ORDERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence, key head and part of the context.

    The GROUP query heads that share a key head are the rows of one matrix, so each key and value
    is read once; the tensor cores want 16 rows, the others are padding.
    """
    seq, kv_head = tl.program_id(0) // NUM_KV_HEADS, tl.program_id(0) % NUM_KV_HEADS
    split, num_rows = tl.program_id(1), tl.num_programs(0)
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    if IS_ORDERED:
        seq = tl.load(order + seq)
    item = seq * NUM_KV_HEADS + kv_head
    context_len = tl.load(context_lens + seq)
    per_split = tl.cdiv(tl.cdiv(context_len, TILE), num_splits) * TILE
    used = tl.cdiv(context_len, tl.maximum(per_split, 1))  # parts of a short context are left out
    if split >= tl.maximum(used, 1):
        return
    start = split * per_split
    stop = tl.minimum(start + per_split, context_len)
    q_row = (item.to(tl.int64) * GROUP + row[:, None]) * HEAD_DIM + channel[None, :]
    is_head = row[:, None] < GROUP
    table = block_tables + seq.to(tl.int64) * table_stride
    wait_for_inputs(PDL)
    queries = tl.load(q + q_row, mask=is_head, other=0.0)
    best, total, mean = decode_part(
        queries, k_cache, v_cache, table, start, stop, kv_head, scale,
        BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM, ROWS, TILE,
    )  # fmt: skip
    if not IS_SPLIT:
        tl.store(out + q_row, mean.to(out.dtype.element_ty), mask=is_head)
    else:
        at = (split * num_rows + item) * GROUP
        store_part(partial, lse, at, best, total, mean, GROUP, HEAD_DIM, ROWS)
        tl.debug_barrier()  # all of this part is written before it is counted
        if tl.atomic_add(counters + item, 1, sem="acq_rel") >= used - 1:
            tl.store(counters + item, 0)
            join_parts(out, partial, lse, item, num_rows, used, GROUP, HEAD_DIM, GROUP_ROWS)


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


LOG2_E = 1.4426950408889634


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
    whose output is 0. `order`: [num_seqs] int32, in which to begin: the longest first leaves the
    least wait at the end. It and the lengths are read early: see `wait_for_inputs`. `counters`:
    zeros, [num_seqs * num_kv_heads] int32 or more, left zero; calls that share them must not
    overlap.
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    rows, group = len(block_tables) * num_kv_heads, q.shape[1] // num_kv_heads
    splits = splits_for(rows, q.device) if num_splits is None else num_splits
    is_ordered, pdl = order is not None and splits == 1, overlaps(q)
    # Measured: small tiles, for more parts, where a few sequences have the chip to themselves.
    tile, stages = (64, 3) if splits <= 16 and q.element_size() == 2 else (32, 2)
    out = torch.empty_like(q) if out is None else out
    partial = lse = out  # where nothing is split, nobody uses them
    if splits > 1:
        partial, lse, counters = room_for_parts(q, splits, rows, group, counters)
    decode_kernel[rows, splits](
        out, partial, lse, counters if splits > 1 else context_lens,
        q, k_cache, v_cache, block_tables, context_lens, order if is_ordered else context_lens,
        scale * LOG2_E, block_tables.stride(0), splits,
        BLOCK_SIZE=block_size, NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim,
        ROWS=max(16, triton.next_power_of_2(group)), GROUP_ROWS=triton.next_power_of_2(group),
        TILE=tile, IS_SPLIT=splits > 1, IS_ORDERED=is_ordered, PDL=pdl, launch_pdl=pdl,
        num_warps=2, num_stages=stages,
    )  # fmt: skip
    return out

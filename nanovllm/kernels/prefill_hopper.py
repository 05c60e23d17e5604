"""Prefill attention on a Hopper GPU: one warp fetches while two warpgroups compute."""

import torch

from nanovllm.kernels.gluon import (
    HAS_GLUON,
    STAGES,
    describe,
    fetch,
    fetch_tile,
    gl,
    gluon,
    hopper,
    make_ring,
    wait_for_all,
)
from nanovllm.kernels.jit import is_hopper, tl, triton

ROWS = gl.constexpr(64)  # of queries, for each of the two consumers
TILE = gl.constexpr(128)  # keys, and values, that are fetched at a time


@gluon.jit
def find_rows(seqs, NUM_HEADS: gl.constexpr):
    """Which rows are this program's: the heads of a group side by side, the longest rows first."""
    cu_seqlens, context_lens, num_parts, first_seq = seqs
    part = gl.program_id(0) // NUM_HEADS
    seq = first_seq + part // num_parts
    first = (num_parts - 1 - part % num_parts) * (2 * ROWS)
    begin = gl.load(cu_seqlens + seq)
    num_new = gl.load(cu_seqlens + seq + 1) - begin
    context_len = gl.load(context_lens + seq)
    start = context_len - num_new + first  # the position of the first row
    stop = gl.minimum(start + 2 * ROWS, context_len)
    if first >= num_new:  # there are none: producer and consumers end at once
        stop = 0
    return seq, first, begin, num_new, context_len, start, stop


@gluon.jit
def produce(
    descs, block_tables, table_stride, seqs, queries, keys, values,
    BLOCK_SIZE: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The producer: each tile as soon as there is room for it, in the order of their use."""
    tl.extra.cuda.gdc_wait()
    seq, first, begin, _, _, _, stop = find_rows(seqs, NUM_HEADS)
    if stop > 0:
        q_desc, k_desc, v_desc = descs
        q_rows, q_full = queries
        HEAD_DIM: gl.constexpr = q_desc.block_type.shape[1]
        head = gl.program_id(0) % NUM_HEADS
        for who in gl.static_range(2):
            row = begin + first + who * ROWS
            fetch(q_desc, row, head * HEAD_DIM, q_full.index(who), q_rows.index(who))
        channel = head // GROUP * HEAD_DIM
        table = block_tables + seq.to(gl.int64) * table_stride
        slot = gl.maximum(gl.load(table).to(gl.int32), 0) * BLOCK_SIZE
        block = gl.load(table + gl.minimum(TILE, stop - 1) // BLOCK_SIZE).to(gl.int32)
        fetch_tile(k_desc, slot, channel, keys, 0)
        for tile in range(gl.cdiv(stop, TILE)):  # its values, and the keys of the next one
            at = (tile + 1) * TILE
            next_slot = gl.maximum(block, 0) * BLOCK_SIZE + at % BLOCK_SIZE
            # Where the one after lies is asked for before we wait for room.
            block = gl.load(table + gl.minimum(at + TILE, stop - 1) // BLOCK_SIZE).to(gl.int32)
            if at < stop:
                fetch_tile(k_desc, next_slot, channel, keys, tile + 1)
            fetch_tile(v_desc, slot, channel, values, tile)
            slot = next_slot


@gluon.jit
def start_scores(queries, keys, tile, position):
    """Begin the product of the queries and a tile of keys, once that has arrived."""
    tiles, full, _ = keys
    hopper.mbarrier.wait(full.index(tile % STAGES), tile // STAGES & 1)
    layout: gl.constexpr = position.type.layout.parent
    zero = gl.zeros([ROWS, TILE], gl.float32, layout)
    turned = tiles.index(tile % STAGES).permute((1, 0))
    return hopper.warpgroup_mma(queries, turned, zero, use_acc=False, is_async=True)


@gluon.jit
def take_products(best, total, scores, scale, tile, position, MASKED: gl.constexpr):
    """The online softmax: each row's maximum and sum, how much old sums shrink, the weights."""
    if MASKED:
        column = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(column[None, :] <= position[:, None], scores, -float("inf"))
    new_best = gl.maximum(best, gl.max(scores, 1) * scale)
    shrink = gl.exp2(best - new_best)
    weights = gl.exp2(scores * scale - new_best[:, None])
    return new_best, total * shrink + gl.sum(weights, 1), shrink, weights


@gluon.jit
def attend_tile(
    queries, keys, values, tile, weights, mean, best, total, scale, position, MASKED: gl.constexpr
):  # fmt: skip
    """The scores and weights of a tile, while those of the one before it meet their values."""
    tiles, full, empty = values
    before = tile - 1
    scores = start_scores(queries, keys, tile, position)
    hopper.mbarrier.wait(full.index(before % STAGES), before // STAGES & 1)
    mean = hopper.warpgroup_mma(weights, tiles.index(before % STAGES), mean, is_async=True)
    scores = hopper.warpgroup_mma_wait(1, deps=(scores,))  # for all products but the latest
    hopper.mbarrier.arrive(keys[2].index(tile % STAGES))  # the place of these keys is empty
    best, total, shrink, new = take_products(best, total, scores, scale, tile, position, MASKED)
    mean, weights = hopper.warpgroup_mma_wait(0, deps=(mean, weights))  # for the latest, too
    hopper.mbarrier.arrive(empty.index(before % STAGES))
    mean *= gl.convert_layout(shrink, gl.SliceLayout(1, mean.type.layout))[:, None]
    weights = gl.convert_layout(new.to(tiles.dtype), weights.type.layout)
    return weights, mean, best, total


@gluon.jit
def attend_context(queries, keys, values, position, start, stop, scale, HEAD_DIM: gl.constexpr):
    """All scores of a consumer's rows, and all values but those of the last tile."""
    row_layout: gl.constexpr = position.type.layout
    mean_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    best = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    mean = gl.zeros([ROWS, HEAD_DIM], gl.float32, mean_layout)
    # Every row sees key 0, so `best` is finite after the first tile.
    scores = hopper.warpgroup_mma_wait(0, deps=(start_scores(queries, keys, 0, position),))
    hopper.mbarrier.arrive(keys[2].index(0))
    best, total, _, weights = take_products(best, total, scores, scale, 0, position, True)
    weights = gl.convert_layout(weights.to(queries.dtype), gl.DotOperandLayout(0, mean_layout, 2))
    seen_by_all = gl.maximum((start + 1) // TILE, 1)
    for tile in range(1, seen_by_all):
        weights, mean, best, total = attend_tile(
            queries, keys, values, tile, weights, mean, best, total, scale, position, False
        )
    for tile in range(seen_by_all, gl.cdiv(stop, TILE)):
        weights, mean, best, total = attend_tile(
            queries, keys, values, tile, weights, mean, best, total, scale, position, True
        )
    return weights, mean, total


@gluon.jit
def zero_tail(values, at, context_len, layout: gl.constexpr):
    """Zeros over what lies behind the context in the tile of values that begins at `at`."""
    PART: gl.constexpr = 32
    row = gl.arange(0, PART, gl.SliceLayout(1, layout))
    for part in gl.static_range(TILE // PART):
        if at + (part + 1) * PART > context_len:
            some = values.slice(part * PART, PART)
            value, there = some.load(layout), (at + part * PART + row < context_len)[:, None]
            some.store(gl.where(there, value, gl.zeros_like(value)))
    hopper.fence_async_shared()


@gluon.jit
def attend_last(values, stop, context_len, weights, mean, total, layout: gl.constexpr):
    """The last tile's values into the mean, which is then whole."""
    tiles, full, _ = values
    tile = (stop - 1) // TILE
    hopper.mbarrier.wait(full.index(tile % STAGES), tile // STAGES & 1)
    if (tile + 1) * TILE > context_len:
        zero_tail(tiles.index(tile % STAGES), tile * TILE, context_len, layout)
    wait_for_all()  # every warp's zeros are written
    mean = hopper.warpgroup_mma(weights, tiles.index(tile % STAGES), mean, is_async=True)
    mean, weights = hopper.warpgroup_mma_wait(0, deps=(mean, weights))
    return mean / gl.convert_layout(total, gl.SliceLayout(1, mean.type.layout))[:, None]


@gluon.jit
def consume(
    out, seqs, queries, keys, values, scale,
    NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """A consumer: ROWS of the program's rows, those from WHO * ROWS on."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    lanes: gl.constexpr = [256 // HEAD_DIM, HEAD_DIM // 8]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], lanes, [4, 1], [1, 0])  # for whole lines
    tl.extra.cuda.gdc_wait()
    _, first, begin, num_new, context_len, start, stop = find_rows(seqs, NUM_HEADS)
    if stop > 0:
        q_rows, q_full = queries
        rows, skipped = q_rows.index(WHO), WHO * ROWS
        position = start + skipped + gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
        hopper.mbarrier.wait(q_full.index(WHO), 0)
        weights, mean, total = attend_context(
            rows, keys, values, position, start, stop, scale, HEAD_DIM
        )
        mean = attend_last(values, stop, context_len, weights, mean, total, layout)
        wait_for_all()
        rows.store(mean.to(rows.dtype))  # where the queries were
        wait_for_all()
        row = first + skipped + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        channel = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
        head = gl.program_id(0) % NUM_HEADS
        where = ((begin + row).to(gl.int64) * NUM_HEADS + head)[:, None] * HEAD_DIM
        is_new = (row < num_new)[:, None]
        gl.store(out + where + channel[None, :], rows.load(layout), mask=is_new)


@gluon.jit(do_not_specialize=["table_stride", "num_parts", "first_seq"])
def prefill_hopper_kernel(
    out, q_desc, k_desc, v_desc, block_tables, context_lens, cu_seqlens, scale, table_stride,
    num_parts, first_seq,
    BLOCK_SIZE: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """One program a sequence, query head and 2 * ROWS of its new tokens."""
    tl.extra.cuda.gdc_launch_dependents()
    q_rows = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, HEAD_DIM], q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        hopper.mbarrier.init(q_full.index(who), count=1)
    queries, keys, values = (q_rows, q_full), make_ring(k_desc), make_ring(v_desc)
    hopper.fence_async_shared()
    seqs = cu_seqlens, context_lens, num_parts, first_seq
    descs = q_desc, k_desc, v_desc
    gl.warp_specialize([
        (consume, (out, seqs, queries, keys, values, scale, NUM_HEADS, HEAD_DIM, 0)),
        (consume, (out, seqs, queries, keys, values, scale, NUM_HEADS, HEAD_DIM, 1)),
        (produce, (descs, block_tables, table_stride, seqs, queries, keys, values,
                   BLOCK_SIZE, NUM_HEADS, NUM_HEADS // NUM_KV_HEADS)),
    ], [4, 1], [240, 24])  # fmt: skip


SHORTEST = 512  # with fewer new tokens a sequence the plain kernel is as fast, or faster
EMPTY = 2  # programs for each that may have rows: many empty ones cost more than it wins


def takes_hopper(q, k_cache, v_cache, max_new: int, num_seqs: int) -> bool:
    """Is this batch, whose longest sequence brings `max_new` tokens, one for this kernel?"""
    rows, tensors = 2 * int(ROWS), (q, k_cache, v_cache)
    full = EMPTY * (triton.cdiv(len(q), rows) + num_seqs)
    fits = max_new >= SHORTEST and num_seqs * triton.cdiv(max_new, rows) <= full
    fits &= q.shape[2] in (64, 128) and k_cache.shape[1] % int(TILE) == 0
    if not (HAS_GLUON and fits and is_hopper(q) and q.dtype in (torch.bfloat16, torch.float16)):
        return False
    return all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in tensors)


def prefill_hopper(
    out, q, k_cache, v_cache, block_tables, context_lens, cu_seqlens, max_new, scale, first_seq
) -> torch.Tensor:
    """`paged_prefill_attention` where `takes_hopper`, on scores that are exponents of 2."""
    num_heads, rows, tile = q.shape[1], int(ROWS), int(TILE)
    num_parts = triton.cdiv(max_new, 2 * rows)
    prefill_hopper_kernel[num_heads * num_parts * (len(block_tables) - first_seq),](
        out, describe(q, rows), describe(k_cache, tile), describe(v_cache, tile), block_tables,
        context_lens, cu_seqlens, scale, block_tables.stride(0), num_parts, first_seq,
        BLOCK_SIZE=k_cache.shape[1], NUM_HEADS=num_heads, NUM_KV_HEADS=k_cache.shape[2],
        HEAD_DIM=q.shape[2], launch_pdl=True, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out

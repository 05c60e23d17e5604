"""The sum over all ranks, the residual add and the RMSNorm after it, in one kernel."""

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs


@triton.jit
def push(part, inboxes, place, tag, there, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Write a row into the inboxes of all others, each number in a word with the tag."""
    if part.dtype == tl.float32:
        word = (part.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tag
    else:
        word = (part.to(tl.int16, bitcast=True).to(tl.int32) << 16) | tag
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            inbox = tl.load(inboxes + rank).to(tl.pointer_type(word.dtype))
            tl.store(tl.multiple_of(inbox, 16) + place, word, mask=there)


@triton.jit
def pull(inbox, place, tag, there, stop, KIND: tl.constexpr):
    """A row that another rank writes, once all of its words have the tag. In float32."""
    WORD: tl.constexpr = tl.int64 if KIND == tl.float32 else tl.int32
    source = tl.multiple_of(inbox.to(tl.pointer_type(WORD)), 16) + place
    words = tl.load(source, mask=there, other=0, volatile=True)
    is_late = tl.max((((words & 0xFFFF) != tag) & there).to(tl.int32), axis=0)
    while (is_late != 0) & (tl.load(stop, volatile=True) == 0):
        words = tl.load(source, mask=there, other=0, volatile=True)
        is_late = tl.max((((words & 0xFFFF) != tag) & there).to(tl.int32), axis=0)
    if KIND == tl.float32:
        return (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)


@triton.jit
def push_flagged(
    part, inboxes, place, flag, count, there,
    END: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Write a row into the inboxes of all others, and a flag when it is there."""
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            inbox = tl.load(inboxes + rank).to(tl.pointer_type(part.dtype))
            tl.store(tl.multiple_of(inbox, 16) + place, part, mask=there)
    tl.debug_barrier()
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            flags = (tl.load(inboxes + rank) + END).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(flags + flag, count, sem="release", scope="sys")


@triton.jit
def pull_flagged(inbox, place, flag, count, there, stop, END: tl.constexpr, KIND: tl.constexpr):
    """A row that another rank writes, once its flag is there. In float32."""
    flags = (inbox + END).to(tl.pointer_type(tl.int32))
    found = tl.atomic_add(flags + flag, 0, sem="acquire", scope="sys")
    while (found != count) & (tl.load(stop, volatile=True) == 0):
        found = tl.atomic_add(flags + flag, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
    source = tl.multiple_of(inbox.to(tl.pointer_type(KIND)), 16) + place
    return tl.load(source, mask=there, other=0, volatile=True).to(tl.float32)


@triton.jit
def sum_over_ranks(
    part, inboxes, row, at, there, count, stop,
    SIZE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    TAGS: tl.constexpr,
):  # fmt: skip
    """All ranks' parts of a row, in float32. `count`: of the row's exchanges, with this one."""
    kind: tl.constexpr = part.dtype
    end: tl.constexpr = 2 * RANKS * ROWS * SIZE * kind.primitive_bitwidth // 8
    inbox, total = tl.load(inboxes + RANK), tl.zeros_like(part).to(tl.float32)
    tag, first = count & 0xFFFF, (count & 1) * RANKS * ROWS + row  # where rank 0 writes
    here = first + RANK * ROWS
    if TAGS:
        push(part, inboxes, here * SIZE + at, tag, there, RANK, RANKS)
    else:
        push_flagged(part, inboxes, here * SIZE + at, here, count, there, end, RANK, RANKS)
    for rank in tl.static_range(RANKS):
        here = first + rank * ROWS
        if rank == RANK:
            total += part.to(tl.float32)
        elif TAGS:
            total += pull(inbox, here * SIZE + at, tag, there, stop, kind)
        else:
            total += pull_flagged(inbox, here * SIZE + at, here, count, there, stop, end, kind)
    return total


@triton.jit
def all_reduce_kernel(
    out, total, x, residual, weight, inboxes, counts, stop, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, TAGS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row, which waits for nothing but the others' parts of that row."""
    row, at = tl.program_id(0), tl.arange(0, PADDED)
    there, here = at < SIZE, row.to(tl.int64) * SIZE + at
    kind: tl.constexpr = x.dtype.element_ty
    if NORM:
        scale = tl.load(weight + at, mask=there).to(tl.float32)
    wait_for_inputs(PDL)
    count = tl.load(counts + row) + 1
    part = tl.load(x + here, mask=there, other=0.0)
    stream = sum_over_ranks(
        part, inboxes, row, at, there, count, stop, SIZE, ROWS, RANK, RANKS, TAGS
    ).to(kind)
    if NORM:
        other = tl.load(residual + here, mask=there, other=0.0)
        stream = (stream.to(tl.float32) + other.to(tl.float32)).to(kind)
    tl.store(total + here, stream, mask=there)
    tl.store(counts + row, count)
    if NORM:
        stream = stream.to(tl.float32)
        stream *= tl.rsqrt(tl.sum(stream * stream, axis=0) / SIZE + eps)
        tl.store(out + here, (stream * scale).to(kind), mask=there)


def all_reduce(
    x: torch.Tensor, inboxes: torch.Tensor, counts: torch.Tensor, stop: torch.Tensor, rank: int,
    tags: bool, residual: torch.Tensor | None = None, weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The sum of all ranks' x; with a residual, the stream normalised and the stream itself.

    x, residual: [num_rows, size], contiguous, the same shape on every rank, which all call this.
    inboxes: [ranks] int64, addresses; counts: [rows of an inbox] int32; stop: [1] int32, not 0 to
    wait for nobody. `tags` or flags say that a row is there. Every rank gets the same bits.
    """
    total, size, pdl = torch.empty_like(x), x.shape[-1], overlaps(x)
    out = total if residual is None else torch.empty_like(x)
    padded = triton.next_power_of_2(size)
    all_reduce_kernel[len(x),](
        out, total, x, x if residual is None else residual, x if weight is None else weight,
        inboxes, counts, stop, eps,
        SIZE=size, PADDED=padded, ROWS=len(counts), RANK=rank, RANKS=len(inboxes),
        TAGS=tags, NORM=residual is not None, PDL=pdl, launch_pdl=pdl,
        num_warps=min(max(padded // 512, 1), 8),
    )  # fmt: skip
    return out, total

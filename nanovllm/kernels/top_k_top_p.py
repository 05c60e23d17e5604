"""Top-k and top-p without a sort: the threshold is searched, digit by digit."""

import torch

from nanovllm.kernels.jit import num_processors, overlaps, tl, triton, wait_for_inputs
from nanovllm.kernels.sample import TINY


@triton.jit
def keys_of(x, SHIFT: tl.constexpr):
    """Integers in the order of the float32 numbers x, without the SHIFT lowest bits."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True) >> SHIFT


@triton.jit
def load_row(row, start, num_columns, best, cold, WEIGH: tl.constexpr, BLOCK: tl.constexpr):
    """Some logits of a row, where they are, and what each counts: one, or its mass."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(row + at, mask=at < num_columns, other=-float("inf")).to(tl.float32)
    if WEIGH:
        return x, at, tl.exp((x - best) * cold)
    else:
        return x, at, (at < num_columns).to(tl.float32)


@triton.jit
def least_key(
    row, num_columns, bound, best, cold,
    WEIGH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The least key above which there is less than `bound`."""
    first, step = tl.full([], 0, tl.uint32), tl.full([], 1 << (30 - SHIFT), tl.uint32)
    for _ in range((32 - SHIFT) // 2):
        a = tl.zeros([BLOCK], tl.float32)
        b, c = a, a
        for start in range(0, num_columns, BLOCK):
            x, at, counts = load_row(row, start, num_columns, best, cold, WEIGH, BLOCK)
            key = keys_of(x, SHIFT)
            a += tl.where(key >= first + step, counts, 0.0)
            b += tl.where(key >= first + 2 * step, counts, 0.0)
            c += tl.where(key >= first + 3 * step, counts, 0.0)
        first += tl.where(tl.sum(a, axis=0) >= bound, step, 0)
        first += tl.where(tl.sum(b, axis=0) >= bound, step, 0)
        first += tl.where(tl.sum(c, axis=0) >= bound, step, 0)
        step = step >> 2
    return first


@triton.jit
def amounts(
    row, num_columns, first, best, cold,
    WEIGH: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How much lies above a key, and how much one token with that key counts (0 without any)."""
    above, one = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        x, at, counts = load_row(row, start, num_columns, best, cold, WEIGH, BLOCK)
        key = keys_of(x, SHIFT)
        above += tl.where(key > first, counts, 0.0)
        one = tl.maximum(one, tl.where(key == first, counts, 0.0))
    return tl.sum(above, axis=0), tl.max(one, axis=0)


@triton.jit
def drop_below(row, num_columns, first, ties, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """-inf for all logits below a key, and for all but the first `ties` that have it."""
    seen = tl.zeros([], tl.float32)
    for start in range(0, num_columns, BLOCK):
        x, at, there = load_row(row, start, num_columns, 0.0, 0.0, False, BLOCK)
        key = keys_of(x, SHIFT)
        is_tie = tl.where((key == first) & (there > 0), 1.0, 0.0)
        rank = seen + tl.cumsum(is_tie, axis=0)
        is_kept = (key > first) | ((is_tie > 0) & (rank <= ties)) | (x != x)  # a NaN is left
        tl.store(row + at, -float("inf"), mask=(there > 0) & (is_kept == 0))
        seen += tl.sum(is_tie, axis=0)


@triton.jit
def top_k_top_p_kernel(
    logits, temperatures, top_ks, top_ps, num_columns,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    seq = tl.program_id(0)
    wait_for_inputs(PDL)
    row = logits + seq.to(tl.int64) * num_columns
    top_k, top_p = tl.load(top_ks + seq).to(tl.float32), tl.load(top_ps + seq)
    cold = 1 / tl.maximum(tl.load(temperatures + seq), TINY)
    best, ties = tl.full([], -float("inf"), tl.float32), tl.full([], float("inf"), tl.float32)
    for start in range(0, num_columns, BLOCK):
        x, at, counts = load_row(row, start, num_columns, 0.0, 0.0, False, BLOCK)
        best = tl.maximum(best, tl.max(x, axis=0))
    best = tl.where(best > -float("inf"), best, 0.0)
    first = tl.full([], 0, tl.uint32)
    if top_k > 0:
        first = least_key(row, num_columns, top_k, best, cold, False, SHIFT, BLOCK)
        above, one = amounts(row, num_columns, first, best, cold, False, SHIFT, BLOCK)
        ties = top_k - above
    if top_p < 1:
        above, one = amounts(row, num_columns, first, best, cold, True, SHIFT, BLOCK)
        mass = tl.maximum(top_p * tl.where(top_k > 0, above + ties * one, above), 1e-30)
        if mass <= above:  # else top-k's threshold stays
            first = least_key(row, num_columns, mass, best, cold, True, SHIFT, BLOCK)
            above, one = amounts(row, num_columns, first, best, cold, True, SHIFT, BLOCK)
            ties = tl.full([], float("inf"), tl.float32)
        ties = tl.minimum(ties, tl.maximum(tl.ceil((mass - above) / one), 1))
    drop_below(row, num_columns, first, ties, SHIFT, BLOCK)


def keep_top_k_top_p_(
    logits: torch.Tensor, temperatures: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor
) -> torch.Tensor:
    """Overwrite by -inf what top-k, and of what it leaves top-p, does not keep.

    logits: [num_seqs, vocab_size], contiguous; temperatures, top_ps: [num_seqs] float32, the
    masses at that temperature; top_ks: [num_seqs] int64, 0 for all. Equal logits are taken in the
    order of the vocabulary; the likeliest token stays. A NaN is left where it is.
    """
    # Half a multiprocessor's registers for a row, or all of them where the rows are few.
    many, pdl = len(logits) > num_processors(logits.device), overlaps(logits)
    top_k_top_p_kernel[len(logits),](
        logits, temperatures, top_ks, top_ps, logits.shape[1],
        SHIFT=16 if logits.dtype == torch.bfloat16 else 0, BLOCK=4096 if many else 8192,
        PDL=pdl, launch_pdl=pdl, num_warps=8 if many else 16,
    )  # fmt: skip
    return logits

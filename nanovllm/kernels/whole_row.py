"""Sampling with a filter from a whole row: where so many tokens are likely that all are asked."""

from nanovllm.kernels.jit import tl, triton, wait_for_inputs
from nanovllm.kernels.likely_tokens import amounts, key_in_row, keys_of, load_row
from nanovllm.kernels.sample import LN_2, TINY, exponential_noise


@triton.jit
def threshold(
    row, num_columns, best, cold, top_k, top_p, min_p, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The least key that the filters keep, and how many of the tokens that have it."""
    ties, first = tl.full([], float("inf"), tl.float32), tl.full([], 0, tl.uint32)
    if top_k > 0:
        first = key_in_row(row, num_columns, top_k, best, cold, min_p, False, SHIFT, BLOCK)
        above, one = amounts(row, num_columns, first, best, cold, min_p, False, SHIFT, BLOCK)
        ties = top_k - above
    if top_p < 1:
        above, one = amounts(row, num_columns, first, best, cold, min_p, True, SHIFT, BLOCK)
        mass = tl.maximum(top_p * tl.where(first > 0, above + ties * one, above), 1e-30)
        if mass <= above:  # else top-k's threshold stays
            first = key_in_row(row, num_columns, mass, best, cold, min_p, True, SHIFT, BLOCK)
            above, one = amounts(row, num_columns, first, best, cold, min_p, True, SHIFT, BLOCK)
            ties = tl.full([], float("inf"), tl.float32)
        ties = tl.minimum(ties, tl.maximum(tl.ceil((mass - above) / one), 1))
    return first, ties


@triton.jit
def draw(
    row, num_columns, first, ties, best, cold, min_p, seed, position,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The winner of the tokens above a key, and of the first `ties` that have it."""
    seen, top = tl.full([], 0, tl.float32), tl.full([], -float("inf"), tl.float32)
    token = num_columns - 1
    for start in range(0, num_columns, BLOCK):
        x, at, counts = load_row(row, start, num_columns, best, cold, min_p, False, BLOCK)
        key = keys_of(x, SHIFT)
        is_tie = tl.where((key == first) & (counts > 0), 1.0, 0.0)
        is_kept = (key > first) | ((is_tie > 0) & (seen + tl.cumsum(is_tie, axis=0) <= ties))
        noise = exponential_noise(seed, position, at)
        score = (x - best) * cold - LN_2 * tl.log2(noise)
        score = tl.where(is_kept & (counts > 0), score, -float("inf"))
        highest = tl.max(score, axis=0)
        winner = tl.min(tl.where(score == highest, at, num_columns - 1), axis=0)
        token = tl.where(highest > top, winner, token)
        top = tl.maximum(top, highest)
        seen += tl.sum(is_tie, axis=0)
    return token


@triton.jit
def whole_row_kernel(
    token_ids, left, logits, temperatures, seeds, positions, top_ks, top_ps, min_ps, num_columns,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row, which ends at once where the row is not left."""
    seq = tl.program_id(0)
    wait_for_inputs(PDL)
    if tl.load(left + seq) > 0:
        row = logits + seq.to(tl.int64) * num_columns
        top_k, top_p = tl.load(top_ks + seq).to(tl.float32), tl.load(top_ps + seq)
        cold, min_p = 1 / tl.maximum(tl.load(temperatures + seq), TINY), tl.load(min_ps + seq)
        best = tl.full([], -float("inf"), tl.float32)
        for start in range(0, num_columns, BLOCK):
            x, at, counts = load_row(row, start, num_columns, 0.0, 0.0, 0.0, False, BLOCK)
            best = tl.maximum(best, tl.max(x, axis=0))
        best = tl.where(best > -float("inf"), best, 0.0)
        first, ties = threshold(row, num_columns, best, cold, top_k, top_p, min_p, SHIFT, BLOCK)
        token = draw(
            row, num_columns, first, ties, best, cold, min_p, tl.load(seeds + seq),
            tl.load(positions + seq), SHIFT, BLOCK,
        )  # fmt: skip
        tl.store(token_ids + seq, token.to(tl.int64))

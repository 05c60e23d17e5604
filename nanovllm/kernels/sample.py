"""Sampling by the Gumbel-max trick without a sort: the logits are read once."""

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs

BLOCK = 2048
LN_2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(2.0**-126)  # no temperature below it: its inverse would overflow


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One token a sequence, as `sample_torch` chooses it without a filter.

    logits: [num_seqs, vocab_size], contiguous; temperatures: [num_seqs] float32; seeds, positions:
    [num_seqs] int64 -> token_ids: [num_seqs] int64, -1 for a row that holds a NaN. The vocabulary
    is cut into parts; each yields its best token, and a second kernel takes the best of these.
    """
    num_seqs, vocab_size = logits.shape
    parts, pdl = triton.cdiv(vocab_size, BLOCK), overlaps(logits)
    highest = logits.new_empty((num_seqs, parts), dtype=torch.float32)
    scores, tokens = torch.empty_like(highest), torch.empty_like(highest, dtype=torch.int32)
    token_ids = torch.empty_like(seeds)
    sample_part_kernel[num_seqs, parts](
        highest, scores, tokens, logits, temperatures, seeds, positions, vocab_size,
        BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    sample_best_kernel[num_seqs,](
        token_ids, highest, scores, tokens, temperatures, parts,
        PADDED=triton.next_power_of_2(parts), PDL=pdl, launch_pdl=pdl, num_warps=1,
    )  # fmt: skip
    return token_ids


@triton.jit
def mix32(x):
    """Scramble 32-bit integers: lowbias32, as in the sampler."""
    x = (x ^ (x >> 16)) * tl.full([], 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def key_words(seed, position):
    """The two words of a row, as in the sampler."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    place = position.to(tl.uint32)
    a = mix32(low + mix32(place))
    b = mix32(high + a + place)
    return mix32(a + b), b


@triton.jit
def sample_part_kernel(
    highest, scores, tokens, logits, temperatures, seeds, positions, vocab_size,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence and BLOCK tokens: the best logit, the best score, and whose it is."""
    seq, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    temperature = tl.load(temperatures + seq)
    row = logits + seq.to(tl.int64) * vocab_size
    x = tl.load(row + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    score = x - tl.where(best > -float("inf"), best, 0.0)  # a part may be all -inf
    if temperature > 0:
        a, b = key_words(tl.load(seeds + seq), tl.load(positions + seq))
        word = column.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32)
        word = (word ^ (word >> 16)) + a
        bits = mix32((word ^ (word >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32) + b)
        uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
        uniform = tl.minimum(uniform, 0.99999994)
        # -log(1 - u), by its series where 1 - u would lose what u has
        series = uniform * (1 + uniform * (0.5 + uniform * (0.33333333 + uniform * 0.25)))
        noise = tl.where(uniform < 0.01, series, -LN_2 * tl.log2(1 - uniform))
        score = score * (1 / tl.maximum(temperature, TINY)) - LN_2 * tl.log2(noise)
        score = tl.where(column < vocab_size, score, -float("inf"))
    at = seq * tl.num_programs(1) + part
    tl.store(highest + at, best)
    top = tl.max(score, axis=0)
    tl.store(scores + at, top)
    token = tl.where(score == top, column, vocab_size - 1)  # one that there is, whatever happens
    tl.store(tokens + at, tl.min(tl.where(x == x, token, -1), axis=0))  # NaN equals nothing


@triton.jit
def sample_best_kernel(
    token_ids, highest, scores, tokens, temperatures, parts, PADDED: tl.constexpr, PDL: tl.constexpr
):
    """One program a sequence: the best of its parts, whose scores count from their own best."""
    seq, part = tl.program_id(0), tl.arange(0, PADDED)
    wait_for_inputs(PDL)
    temperature = tl.load(temperatures + seq)
    at, there = seq * parts + part, part < parts
    best = tl.load(highest + at, mask=there, other=-float("inf"))
    behind = best - tl.max(best, axis=0)
    score = tl.load(scores + at, mask=there, other=-float("inf"))
    if temperature > 0:
        score += behind / tl.maximum(temperature, TINY)
    else:
        score = behind
    winner = tl.minimum(tl.argmax(score, axis=0), parts - 1)
    token = tl.load(tokens + seq * parts + winner)
    has_nan = tl.min(tl.load(tokens + at, mask=there, other=0), axis=0) < 0
    tl.store(token_ids + seq, tl.where(has_nan, -1, token).to(tl.int64))

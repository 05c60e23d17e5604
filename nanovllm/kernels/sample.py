"""Sampling by the Gumbel-max trick without a sort: the logits are read once."""

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs

LN_2 = tl.constexpr(0.6931471805599453)


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
def exponential_noise(seed, position, column):
    """Exponential random numbers, one a column, as in the sampler."""
    a, b = key_words(seed, position)
    word = column.to(tl.uint32) * tl.full([], 0x9E3779B9, tl.uint32)
    word = (word ^ (word >> 16)) + a
    bits = mix32((word ^ (word >> 16)) * tl.full([], 0x85EBCA6B, tl.uint32) + b)
    uniform = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    uniform = tl.minimum(uniform, 0.99999994)
    # -log(1 - u), by its series where 1 - u would lose what u has
    series = uniform * (1 + uniform * (0.5 + uniform * (0.33333333 + uniform * 0.25)))
    return tl.where(uniform < 0.01, series, -LN_2 * tl.log2(1 - uniform))


TINY = tl.constexpr(2.0**-126)  # no temperature below it: its inverse would overflow


@triton.jit
def sample_part_kernel(
    highest, scores, tokens, logits, temperatures, seeds, positions, num_columns,
    FIRST_COLUMN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence and BLOCK tokens: the best logit, the best score, and whose it is."""
    seq, part = tl.program_id(0), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    column, there = FIRST_COLUMN + at, at < num_columns
    wait_for_inputs(PDL)
    temperature = tl.load(temperatures + seq)
    row = logits + seq.to(tl.int64) * num_columns
    x = tl.load(row + at, mask=there, other=-float("inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    score = x - tl.where(best > -float("inf"), best, 0.0)  # a part may be all -inf
    if temperature > 0:
        seed, position = tl.load(seeds + seq), tl.load(positions + seq)
        noise = exponential_noise(seed, position, column)
        score = score * (1 / tl.maximum(temperature, TINY)) - LN_2 * tl.log2(noise)
        score = tl.where(there, score, -float("inf"))
    out = seq * tl.num_programs(1) + part
    tl.store(highest + out, best)
    top = tl.max(score, axis=0)
    tl.store(scores + out, top)
    last = FIRST_COLUMN + num_columns - 1
    token = tl.where(score == top, column, last)  # one that there is, whatever happens
    tl.store(tokens + out, tl.min(tl.where(x == x, token, -1), axis=0))  # NaN equals nothing


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


BLOCK = 2048
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # all [num_seqs, num_parts]


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One token a sequence, as `sample_torch` chooses it without a filter.

    logits: [num_seqs, vocab_size], contiguous; temperatures: [num_seqs] float32; seeds, positions:
    [num_seqs] int64 -> token_ids: [num_seqs] int64, -1 for a row that holds a NaN.
    """
    return sample_best(sample_parts(logits, temperatures, seeds, positions), temperatures)


def sample_parts(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_column: int = 0,
) -> Parts:
    """The vocabulary in parts: of each its highest logit, its best score, and whose that is.

    logits: [num_seqs, num_columns], the columns from `first_column` of the vocabulary on.
    """
    num_seqs, num_columns = logits.shape
    num_parts, pdl = triton.cdiv(num_columns, BLOCK), overlaps(logits)
    highest = logits.new_empty((num_seqs, num_parts), dtype=torch.float32)
    scores, tokens = torch.empty_like(highest), torch.empty_like(highest, dtype=torch.int32)
    sample_part_kernel[num_seqs, num_parts](
        highest, scores, tokens, logits, temperatures, seeds, positions, num_columns,
        FIRST_COLUMN=first_column, BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return highest, scores, tokens


def sample_best(parts: Parts, temperatures: torch.Tensor) -> torch.Tensor:
    """The best token of all parts, [num_seqs] int64; -1 for a row in which one has a NaN."""
    highest, scores, tokens = parts
    (num_seqs, num_parts), pdl = highest.shape, overlaps(highest)
    token_ids = torch.empty_like(tokens[:, 0], dtype=torch.int64)
    sample_best_kernel[num_seqs,](
        token_ids, highest, scores, tokens, temperatures, num_parts,
        PADDED=triton.next_power_of_2(num_parts), PDL=pdl, launch_pdl=pdl, num_warps=1,
    )  # fmt: skip
    return token_ids

"""How likely tokens are: one of each row, and the likeliest, in one pass over the logits."""

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs

NOTHING = tl.constexpr(-(2**63))  # below each code


@triton.jit
def code_of(x, column):
    """Integers in the order of the float32 numbers x; of equal ones the first column's is larger.

    A negative number's bits grow with its size, but for the sign: they are turned round.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)


@triton.jit(do_not_specialize=["count"])
def score_parts_kernel(
    codes, highest, masses, logits, num_columns, count, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program a row and BLOCK columns: the highest logit, the mass, `count` largest codes."""
    row, part, num_parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    there, at = column < num_columns, row * num_parts + part
    wait_for_inputs(PDL)
    x = tl.load(logits + row.to(tl.int64) * num_columns + column, mask=there, other=-float("inf"))
    x = x.to(tl.float32)
    best = tl.max(x, axis=0)
    tl.store(highest + at, best)
    tl.store(masses + at, tl.sum(tl.exp(x - tl.where(best > -float("inf"), best, 0.0)), axis=0))
    code = tl.where(there, code_of(x, column), NOTHING)
    for i in range(count):
        top = tl.max(code, axis=0)
        tl.store(codes + at * count + i, top)
        code = tl.where(code == top, NOTHING, code)


@triton.jit(do_not_specialize=["count"])
def score_rows_kernel(
    out, codes, highest, masses, logits, wanted, sampled, num_columns, num_parts, count,
    PARTS: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: its token's log-probability, those of `count` others, and which."""
    row, part, at = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, PARTS * MOST)
    wait_for_inputs(PDL)
    there = part < num_parts
    x = tl.load(highest + row * num_parts + part, mask=there, other=-float("inf"))
    mass = tl.load(masses + row * num_parts + part, mask=there, other=0.0)
    best = tl.max(x, axis=0)
    best = tl.where(best > -float("inf"), best, 0.0)
    log_mass = tl.log(tl.sum(mass * tl.exp(x - best), axis=0))
    token = tl.load(wanted + 4 * row + 3)
    if token < 0:
        token = tl.maximum(tl.load(sampled + tl.load(wanted + 4 * row)), 0)
    own = tl.load(logits + row.to(tl.int64) * num_columns + token).to(tl.float32)
    out += row * (1 + 2 * count)
    tl.store(out, own - best - log_mass)  # in this order: a logit may be large, its lead is small
    codes += row * num_parts * count
    code = tl.load(codes + at, mask=at < num_parts * count, other=NOTHING)
    for i in range(count):
        top = tl.max(code, axis=0)
        order = (top >> 32).to(tl.int32)
        value = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(out + 1 + i, value - best - log_mass)
        tl.store(out + 1 + count + i, (0x7FFFFFFF - (top & 0x7FFFFFFF)).to(tl.float32))
        code = tl.where(code == top, NOTHING, code)


BLOCK, MOST = 4096, 32  # columns of a part; no request may ask for more likely tokens


def logprobs_of(
    logits: torch.Tensor, wanted: torch.Tensor, sampled: torch.Tensor, num_top: int
) -> torch.Tensor:
    """Of each row the token that is wanted, and the `num_top` likeliest (or as many as there are).

    logits: [num_rows, vocab_size], contiguous; wanted: a row of `wanted_scores` for each, int64;
    sampled: what the step's rows have sampled, int64 -> [num_rows, 1 + 2 * num_top] float32: the
    token's log-probability, those of the likeliest, and which these are, of equal ones the first.
    """
    (num_rows, num_columns), count = logits.shape, min(num_top, logits.shape[1])
    if not uses_triton(logits):
        return logprobs_torch(logits, wanted, sampled, count)
    num_parts, pdl = triton.cdiv(num_columns, BLOCK), overlaps(logits)
    codes = wanted.new_empty((num_rows, num_parts, count))
    highest = logits.new_empty((num_rows, num_parts), dtype=torch.float32)
    masses, out = torch.empty_like(highest), highest.new_empty((num_rows, 1 + 2 * count))
    score_parts_kernel[num_rows, num_parts](
        codes, highest, masses, logits, num_columns, count,
        BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=8,
    )  # fmt: skip
    score_rows_kernel[num_rows,](
        out, codes, highest, masses, logits, wanted, sampled, num_columns, num_parts, count,
        PARTS=triton.next_power_of_2(num_parts), MOST=MOST, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return out  # a float is exact below 2**24


def logprobs_torch(
    logits: torch.Tensor, wanted: torch.Tensor, sampled: torch.Tensor, count: int
) -> torch.Tensor:
    """`logprobs_of` in torch."""
    row, token_ids = wanted[:, 0], wanted[:, 3]
    token_ids = torch.where(token_ids < 0, sampled[row], token_ids).clamp(min=0)
    x = logits.float() + 0.0  # -0 becomes 0
    bits, column = x.view(torch.int32), torch.arange(x.shape[1], device=x.device)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    codes = (order.long() << 32) | (0x7FFFFFFF - column)
    ids = 0x7FFFFFFF - (codes.topk(count, dim=1).values & 0x7FFFFFFF)
    told = x.gather(1, torch.cat([token_ids.unsqueeze(1), ids], dim=1))
    best = x.amax(dim=1, keepdim=True)
    return torch.cat([told - best - (x - best).logsumexp(dim=1, keepdim=True), ids.float()], dim=1)

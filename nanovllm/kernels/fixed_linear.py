"""Linear layers that give a token the same bits whatever other tokens come with it."""

import torch

from nanovllm.kernels.fixed_order import fixed_counters
from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs


@triton.jit
def product_of_part(
    x, weight, token, row, num_tokens, num_rows, start,
    SIZE: tl.constexpr, PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One part of the sum of some tokens' products with some rows, [BLOCK_M, BLOCK_N] float32."""
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    column = start + tl.arange(0, BLOCK_K)
    # What lies behind the end is some token's or row's, is computed, and is not stored.
    x += tl.minimum(token, num_tokens - 1)[:, None].to(tl.int64) * SIZE + column[None, :]
    weight += tl.minimum(row, num_rows - 1)[None, :].to(tl.int64) * SIZE + column[:, None]
    for at in range(0, PART, BLOCK_K):
        if PART % BLOCK_K == 0:
            a, b = tl.load(x + at), tl.load(weight + at)
        else:
            inside = column + at < start + PART
            a = tl.load(x + at, mask=inside[None, :], other=0.0)
            b = tl.load(weight + at, mask=inside[:, None], other=0.0)
        y = tl.dot(a, b, y, input_precision="ieee")
    return y


@triton.jit
def sum_of_parts(
    parts, counters, y, token, row, num_tokens, num_rows,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Leave a part for the last program of this tile, which gets the sum; and is it this one?"""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = token[:, None].to(tl.int64) * num_rows + row[None, :]
    there = (token < num_tokens)[:, None] & (row < num_rows)[None, :]
    size = num_tokens.to(tl.int64) * num_rows
    tl.store(parts + tl.program_id(2) * size + at, y, mask=there)
    tl.debug_barrier()  # all of this part is written before it is counted
    is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == PARTS - 1
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if is_last:
        tl.store(counters + tile, 0)
        for part in range(PARTS):
            total += tl.load(parts + part * size + at, mask=there, cache_modifier=".cg")
    return total, is_last


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def fixed_linear_kernel(
    out, parts, counters, x, weight, bias, num_tokens, num_rows,
    SIZE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M tokens and BLOCK_N rows of the weights; of the sum one part, or all."""
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    is_last = True
    if APART:
        y = product_of_part(
            x, weight, token, row, num_tokens, num_rows, tl.program_id(2) * PART, SIZE, PART,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total, is_last = sum_of_parts(
            parts, counters, y, token, row, num_tokens, num_rows, PARTS, BLOCK_M, BLOCK_N
        )
    else:
        for part in range(PARTS):
            total += product_of_part(
                x, weight, token, row, num_tokens, num_rows, part * PART, SIZE, PART, BLOCK_M,
                BLOCK_N, BLOCK_K,
            )  # fmt: skip
    if is_last:
        there = (token < num_tokens)[:, None] & (row < num_rows)[None, :]
        if BIAS:
            total += tl.load(bias + row, mask=row < num_rows, other=0.0).to(tl.float32)[None, :]
        at = token[:, None].to(tl.int64) * num_rows + row[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


FEW = 256  # tokens up to which the parts are computed apart
WIDE, DEEP = 64, 64  # rows and columns of the weights that a tile of few tokens holds
PROGRAMS = 128  # enough of them for a GPU
MOST_TILES = 1024  # whose parts are counted: PROGRAMS rows of tiles, at most


def num_parts(size: int, num_rows: int) -> int:
    """Into how many parts the sums of a matrix [num_rows, size] are cut, all as long."""
    tiles, parts = triton.cdiv(num_rows, WIDE), 1
    while parts * tiles < PROGRAMS and size % (2 * parts * DEEP) == 0:
        parts *= 2
    return parts


def fixed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ (+ b) of which each row depends on its row of x alone, to the last bit.

    x: [num_tokens, input_size]; weight: [output_size, input_size], both contiguous. Inside of
    `fixed_order`.
    """
    (num_tokens, size), num_rows, pdl = x.shape, len(weight), overlaps(x)
    parts, is_few = num_parts(size, num_rows), num_tokens <= FEW
    apart = is_few and parts > 1
    rows, columns, warps, stages = (64, WIDE, 4, 4) if is_few else (128, 128, 8, 3)
    out = x.new_empty((num_tokens, num_rows))
    left = x.new_empty((parts, num_tokens, num_rows), dtype=torch.float32) if apart else out
    grid = triton.cdiv(num_rows, columns), triton.cdiv(num_tokens, rows), parts if apart else 1
    fixed_linear_kernel[grid](
        out, left, fixed_counters(), x, weight, out if bias is None else bias, num_tokens, num_rows,
        SIZE=size, PART=size // parts, PARTS=parts, APART=apart, BIAS=bias is not None,
        BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=DEEP, PDL=pdl, launch_pdl=pdl, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out

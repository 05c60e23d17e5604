"""Linear layers that give a token the same bits whatever other tokens come with it."""

import torch

from nanovllm.kernels.fixed_order import fixed_counters
from nanovllm.kernels.jit import overlaps, tl, triton, wait_for_inputs


@triton.jit
def product_of_part(
    x, weight, row, token, num_rows, num_tokens, start,
    SIZE: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One part of the sum of some rows' products with some tokens, [BLOCK_N, BLOCK_M] float32."""
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    column, there = start + tl.arange(0, BLOCK_K), (token < num_tokens)[None, :]
    # What lies behind the last row is that row once more; it is not stored.
    weight += tl.minimum(row, num_rows - 1)[:, None].to(tl.int64) * SIZE + column[None, :]
    x += token[None, :].to(tl.int64) * SIZE + column[:, None]
    for at in range(0, PART, BLOCK_K):
        if PART % BLOCK_K == 0:
            a, b = tl.load(weight + at), tl.load(x + at, mask=there, other=0.0)
        else:
            inside = column + at < start + PART
            a = tl.load(weight + at, mask=inside[None, :], other=0.0)
            b = tl.load(x + at, mask=there & inside[:, None], other=0.0)
        y = tl.dot(a, b, y, input_precision="ieee")
    return y


@triton.jit
def sum_of_parts(
    parts, counters, y, at, there, size,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Leave a part for the last program of this tile, which gets the sum; and is it this one?"""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + tl.program_id(2) * size + at, y, mask=there)
    tl.debug_barrier()  # all of this part is written before it is counted
    is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == PARTS - 1
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if is_last:
        tl.store(counters + tile, 0)
        for part in range(PARTS):
            total += tl.load(parts + part * size + at, mask=there, cache_modifier=".cg")
    return total, is_last


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def fixed_linear_kernel(
    out, parts, counters, x, weight, bias, num_tokens, num_rows,
    SIZE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, APART: tl.constexpr,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_N rows of the weights and BLOCK_M tokens; of the sum one part, or all."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = token[None, :].to(tl.int64) * num_rows + row[:, None]
    there = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
    wait_for_inputs(PDL)
    total, is_last = tl.zeros([BLOCK_N, BLOCK_M], tl.float32), True
    if APART:
        y = product_of_part(
            x, weight, row, token, num_rows, num_tokens, tl.program_id(2) * PART, SIZE, PART,
            BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        size = num_tokens.to(tl.int64) * num_rows
        total, is_last = sum_of_parts(parts, counters, y, at, there, size, PARTS, BLOCK_N, BLOCK_M)
    else:
        for part in range(PARTS):
            total += product_of_part(
                x, weight, row, token, num_rows, num_tokens, part * PART, SIZE, PART, BLOCK_N,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip
    if is_last:
        if BIAS:
            total += tl.load(bias + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


DEEP, WIDE = 128, 64  # columns and rows of the weights in a tile of few tokens
PROGRAMS = 64  # enough of them for a GPU
FEW = 64  # tokens up to which the parts are computed apart
MOST_TILES = PROGRAMS * 4  # whose parts are counted, at most


def num_parts(size: int, num_rows: int) -> int:
    """Into how many parts the sums of a matrix [num_rows, size] are cut, all as long."""
    tiles, parts = triton.cdiv(num_rows, WIDE), 1
    while parts * tiles < PROGRAMS and size % (4 * parts * DEEP) == 0:
        parts *= 2
    return parts


def tile_of(num_tokens: int, takes_any: bool) -> dict[str, int]:
    """Rows, tokens and columns of a tile, and how the kernel is compiled for it."""
    if not takes_any:
        return dict(BLOCK_N=WIDE, BLOCK_M=16, BLOCK_K=DEEP // 2, num_warps=4, num_stages=2)
    if num_tokens <= FEW:
        return dict(BLOCK_N=WIDE, BLOCK_M=16, BLOCK_K=DEEP, num_warps=4, num_stages=4)
    if num_tokens <= 256:
        return dict(BLOCK_N=WIDE, BLOCK_M=64, BLOCK_K=DEEP, num_warps=4, num_stages=3)
    return dict(BLOCK_N=128, BLOCK_M=128, BLOCK_K=DEEP // 2, num_warps=8, num_stages=3)


def fixed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ (+ b) of which each row depends on its row of x alone, to the last bit.

    x: [num_tokens, input_size]; weight: [output_size, input_size], both contiguous. Inside of
    `fixed_order`.
    """
    (num_tokens, size), num_rows, pdl = x.shape, len(weight), overlaps(x)
    # No matrix unit takes float32: there the order depends on the tile. And columns in whole tiles.
    takes_any = x.element_size() == 2 and size % DEEP == 0
    parts, tile = num_parts(size, num_rows), tile_of(num_tokens, takes_any)
    apart = parts > 1 and num_tokens <= FEW
    out = x.new_empty((num_tokens, num_rows))
    left = x.new_empty((parts, num_tokens, num_rows), dtype=torch.float32) if apart else out
    tiles = triton.cdiv(num_rows, tile["BLOCK_N"]), triton.cdiv(num_tokens, tile["BLOCK_M"])
    grid = (*tiles, parts if apart else 1)
    fixed_linear_kernel[grid](
        out, left, fixed_counters(), x, weight, out if bias is None else bias, num_tokens, num_rows,
        SIZE=size, PART=size // parts, PARTS=parts, APART=apart, BIAS=bias is not None, PDL=pdl,
        launch_pdl=pdl, **tile,
    )  # fmt: skip
    return out

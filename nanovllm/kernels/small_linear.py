"""Linear layers for one to three tokens, where all that counts is how fast the weights come."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def small_linear_kernel(
    out, x, weight, num_tokens, num_rows,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK rows of the weights, which it asks for before it waits for x."""
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    there = (row[:, None] < num_rows) & (column[None, :] < SIZE)
    source = weight + row[:, None].to(tl.int64) * SIZE + column[None, :]
    rows = tl.load(source, mask=there, other=0.0)
    if SILU:
        ups = tl.load(source + num_rows.to(tl.int64) * SIZE, mask=there, other=0.0)
    wait_for_inputs(PDL)
    for token in range(num_tokens):
        vector = tl.load(x + token * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        y = tl.sum(rows.to(tl.float32) * vector[None, :], axis=1)
        if SILU:
            kind = out.dtype.element_ty  # each step is rounded where torch rounds it
            up = tl.sum(ups.to(tl.float32) * vector[None, :], axis=1).to(kind).to(tl.float32)
            y = y.to(kind).to(tl.float32)
            y = (y * tl.sigmoid(y)).to(kind).to(tl.float32) * up
        tl.store(out + token * num_rows + row, y.to(out.dtype.element_ty), mask=row < num_rows)


MAX_TOKENS = 3  # from 4 on, cuBLAS is as fast


def is_small(x: torch.Tensor) -> bool:
    """Are these so few tokens that `small_linear` is the faster one?"""
    return uses_triton(x) and len(x) <= MAX_TOKENS


def small_linear(x: torch.Tensor, weight: torch.Tensor, silu: bool = False) -> torch.Tensor:
    """x Wᵀ for few tokens; with `silu`, SwiGLU's product of the two halves of that.

    x: [num_tokens, input_size]; weight: [output_size, input_size], both contiguous.
    """
    num_tokens, size = x.shape
    num_rows = len(weight) // 2 if silu else len(weight)
    padded = triton.next_power_of_2(size)
    block = max(1, min(4, 16384 // padded))  # rows that the registers hold
    out, pdl = x.new_empty((num_tokens, num_rows)), overlaps(x)
    small_linear_kernel[triton.cdiv(num_rows, block),](
        out, x, weight, num_tokens, num_rows,
        SIZE=size, PADDED=padded, BLOCK=block, SILU=silu, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ (+ b), for any number of tokens."""
    if bias is None and is_small(x):
        return small_linear(x, weight)
    return F.linear(x, weight, bias)

"""Linear layers for a few tokens, where all that counts is how fast the weights come."""

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


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def few_tokens_kernel(
    out, x, weight, num_tokens, num_rows,
    SIZE: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    SILU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program 16 rows of the weights, of which each warp takes WIDTH columns at a time."""
    if PDL:  # the next kernel may ask for its weights while these come
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, 16)
    if SILU:  # eight gates, and the eight rows that they are multiplied with
        rows = tl.minimum(tl.program_id(0) * 8 + row % 8, num_rows - 1) + row // 8 * num_rows
    else:
        rows = tl.minimum(tl.program_id(0) * 16 + row, num_rows - 1)
    source = weight + rows[None, :, None].to(tl.int64) * SIZE
    column = tl.arange(0, WARPS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    token = tl.arange(0, TOKENS)[None, :, None]
    weights = tl.load(source + column, mask=column < SIZE, other=0.0)
    wait_for_inputs(PDL)
    y = tl.zeros([WARPS, 16, TOKENS], tl.float32)
    for start in range(0, SIZE, WARPS * WIDTH):
        mask = (token < num_tokens) & (column < SIZE)
        vectors = tl.load(x + token * SIZE + column, mask=mask, other=0.0)
        column += WARPS * WIDTH
        these = weights
        if start + WARPS * WIDTH < SIZE:  # the next ones are on their way meanwhile
            weights = tl.load(source + column, mask=column < SIZE, other=0.0)
        y = tl.dot(these, tl.permute(vectors, [0, 2, 1]), y)
    store_few(out, tl.sum(y, axis=0), num_tokens, num_rows, TOKENS, SILU)


@triton.jit
def store_few(out, y, num_tokens, num_rows, TOKENS: tl.constexpr, SILU: tl.constexpr):
    """Write a program's 16 outputs of each token, [16, TOKENS]; with SILU, eight products."""
    kind = out.dtype.element_ty
    token = tl.arange(0, TOKENS)[None, :]
    if SILU:  # each step is rounded where torch rounds it
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, 8, TOKENS]), [1, 2, 0]))
        gate = gate.to(kind).to(tl.float32)
        y = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
        row = tl.program_id(0) * 8 + tl.arange(0, 8)[:, None]
        mask = (row < num_rows) & (token < num_tokens)
        tl.store(out + token * num_rows + row, y.to(kind), mask=mask)
    else:
        row = tl.program_id(0) * 16 + tl.arange(0, 16)[:, None]
        mask = (row < num_rows) & (token < num_tokens)
        tl.store(out + token * num_rows + row, y.to(kind), mask=mask)


MAX_VECTORS = 3  # tokens that are taken one by one
MAX_TOKENS = 16  # that are taken together
LIGHT = 12 << 20  # weights of a matrix that is small enough for it


def is_light(weight: torch.Tensor) -> bool:
    """Is a matrix so small that it comes sooner by our kernel than by cuBLAS's?"""
    return weight.element_size() == 2 and weight.numel() <= LIGHT


def is_small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Are these so few tokens that `small_linear` is the faster one?"""
    most = MAX_TOKENS if is_light(weight) else MAX_VECTORS
    return uses_triton(x) and len(x) <= most


def small_linear(x: torch.Tensor, weight: torch.Tensor, silu: bool = False) -> torch.Tensor:
    """x Wᵀ for few tokens; with `silu`, SwiGLU's product of the two halves of that.

    x: [num_tokens, input_size]; weight: [output_size, input_size], both contiguous.
    """
    num_tokens, size = x.shape
    num_rows, pdl = len(weight) // 2 if silu else len(weight), overlaps(x)
    out = x.new_empty((num_tokens, num_rows))
    if num_tokens > 1 and is_light(weight):
        launch_few(out, x, weight, silu)
        return out
    padded = triton.next_power_of_2(size)
    block = max(1, min(4, 16384 // padded))  # rows that the registers hold
    small_linear_kernel[triton.cdiv(num_rows, block),](
        out, x, weight, num_tokens, num_rows,
        SIZE=size, PADDED=padded, BLOCK=block, SILU=silu, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    return out


def launch_few(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, silu: bool) -> None:
    """Launch `few_tokens_kernel`: more warps where there are more columns."""
    (num_tokens, size), num_rows, pdl = x.shape, out.shape[1], overlaps(x)
    tokens, warps = 8 if num_tokens <= 8 else 16, 4 if size <= 1024 else 8
    few_tokens_kernel[triton.cdiv(num_rows, 8 if silu else 16),](
        out, x, weight, num_tokens, num_rows, SIZE=size, WARPS=warps,
        WIDTH=256 if warps * tokens <= 64 else 128, TOKENS=tokens, SILU=silu, PDL=pdl,
        launch_pdl=pdl, num_warps=warps, num_stages=1,
    )  # fmt: skip


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ (+ b), for any number of tokens."""
    if bias is None and is_small(x, weight):
        return small_linear(x, weight)
    return F.linear(x, weight, bias)

"""Linear layers for a few tokens, where all that counts is how fast the weights come."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.fixed_linear import fixed_linear
from nanovllm.kernels.fixed_order import order_is_fixed
from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def small_linear_kernel(
    out, x, weight, bias, num_tokens, num_rows,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK rows of the weights, which it asks for before it waits for x."""
    row, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    there = (row[:, None] < num_rows) & (column[None, :] < SIZE)
    source = weight + row[:, None].to(tl.int64) * SIZE + column[None, :]
    rows = tl.load(source, mask=there, other=0.0)
    if SILU:
        ups = tl.load(source + num_rows.to(tl.int64) * SIZE, mask=there, other=0.0)
    if BIAS:
        shift = tl.load(bias + row, mask=row < num_rows, other=0.0).to(tl.float32)
    wait_for_inputs(PDL)
    for token in range(num_tokens):
        vector = tl.load(x + token * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
        y = tl.sum(rows.to(tl.float32) * vector[None, :], axis=1)
        if BIAS:
            y += shift
        if SILU:
            kind = out.dtype.element_ty  # each step is rounded where torch rounds it
            up = tl.sum(ups.to(tl.float32) * vector[None, :], axis=1).to(kind).to(tl.float32)
            y = y.to(kind).to(tl.float32)
            y = (y * tl.sigmoid(y)).to(kind).to(tl.float32) * up
        tl.store(out + token * num_rows + row, y.to(out.dtype.element_ty), mask=row < num_rows)


WARPS, WIDTH = tl.constexpr(4), tl.constexpr(256)  # of a program, and columns of a warp


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def few_tokens_kernel(
    out, parts, counters, x, weight, bias, num_tokens, num_rows,
    SIZE: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program 16 rows of the weights and STEPS times WARPS * WIDTH columns."""
    if PDL:  # the next kernel may ask for its weights while these come
        tl.extra.cuda.gdc_launch_dependents()
    row, tile, token = tl.arange(0, 16), tl.program_id(0), tl.arange(0, TOKENS)[None, :, None]
    if SILU:  # eight gates, and the eight rows that they are multiplied with
        rows = tl.minimum(tile * 8 + row % 8, num_rows - 1) + row // 8 * num_rows
    else:
        rows = tl.minimum(tile * 16 + row, num_rows - 1)
    source = weight + rows[None, :, None].to(tl.int64) * SIZE
    column = tl.arange(0, WARPS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    column += tl.program_id(1) * (STEPS * WARPS * WIDTH)
    weights = tl.load(source + column, mask=column < SIZE, other=0.0)
    wait_for_inputs(PDL)
    y = tl.zeros([WARPS, 16, TOKENS], tl.float32)
    for step in range(STEPS):
        mask = (token < num_tokens) & (column < SIZE)
        vectors = tl.load(x + token * SIZE + column, mask=mask, other=0.0)
        column += WARPS * WIDTH
        these = weights
        if STEPS > 1:  # the next ones are on their way meanwhile
            there = (column < SIZE) & (step + 1 < STEPS)
            weights = tl.load(source + column, mask=there, other=0.0)
        y = tl.dot(these, tl.permute(vectors, [0, 2, 1]), y)
    y = tl.sum(y, axis=0)
    if BIAS:  # once, by the program of the first columns
        is_first = tl.program_id(1) == 0
        y += tl.load(bias + rows, mask=is_first & (rows >= 0), other=0.0).to(tl.float32)[:, None]
    finish(out, parts, counters, y, num_tokens, num_rows, TOKENS, SPLITS, SILU)


@triton.jit
def finish(
    out, parts, counters, y, num_tokens, num_rows,
    TOKENS: tl.constexpr, SPLITS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y: [16, TOKENS], a program's sums; the last program of a tile adds up those of all."""
    tile, split = tl.program_id(0), tl.program_id(1)
    if SPLITS == 1:
        store_few(out, y, num_tokens, num_rows, TOKENS, SILU)
    else:
        at = tl.arange(0, 16)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        own = parts + tile * (SPLITS * 16 * TOKENS) + at
        tl.store(own + split * (16 * TOKENS), y)
        tl.debug_barrier()  # all of this part is written before it is counted
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters + tile, 0)
            total = tl.load(own, cache_modifier=".cg")
            for part in tl.static_range(1, SPLITS):
                total += tl.load(own + part * (16 * TOKENS), cache_modifier=".cg")
            store_few(out, total, num_tokens, num_rows, TOKENS, SILU)


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
    """Are these so few tokens that `small_linear` is the faster one, and may be taken?"""
    most = MAX_TOKENS if is_light(weight) else MAX_VECTORS
    return uses_triton(x) and len(x) <= most and not order_is_fixed()


def launch_small(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> None:
    """Launch `small_linear_kernel`."""
    (num_tokens, size), num_rows, pdl = x.shape, out.shape[1], overlaps(x)
    padded = triton.next_power_of_2(size)
    held = padded * (2 if silu else 1)  # of a row, or of a gate and its partner
    block = max(1, min(4, 16384 // held))  # rows that the registers of four warps hold
    small_linear_kernel[triton.cdiv(num_rows, block),](
        out, x, weight, out if bias is None else bias, num_tokens, num_rows,
        SIZE=size, PADDED=padded, BLOCK=block, SILU=silu, BIAS=bias is not None, PDL=pdl,
        launch_pdl=pdl, num_warps=4 if held <= 16384 else 8,
    )  # fmt: skip


def splits_of(tiles: int, size: int) -> int:
    """Into how many parts the columns are cut: all as long, and so many that 128 programs run."""
    chunks = triton.cdiv(size, WARPS.value * WIDTH.value)
    splits = (n for n in range(1, chunks + 1) if chunks % n == 0)
    return next((n for n in splits if n * tiles >= 128), chunks)


def launch_few(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    counters: torch.Tensor | None,
) -> None:
    """Launch `few_tokens_kernel`; without counters no columns are split."""
    (num_tokens, size), num_rows, pdl = x.shape, out.shape[1], overlaps(x)
    tiles, tokens = triton.cdiv(num_rows, 8 if silu else 16), 8 if num_tokens <= 8 else 16
    splits, parts = splits_of(tiles, size) if counters is not None else 1, out
    if splits > 1:
        parts = x.new_empty((tiles, splits, 16, tokens), dtype=torch.float32)
    few_tokens_kernel[tiles, splits](
        out, parts, out if counters is None else counters, x, weight, out if bias is None else bias,
        num_tokens, num_rows, SIZE=size, TOKENS=tokens, SPLITS=splits, SILU=silu,
        STEPS=triton.cdiv(size, splits * WARPS.value * WIDTH.value), BIAS=bias is not None,
        PDL=pdl, launch_pdl=pdl, num_warps=WARPS.value, num_stages=1,
    )  # fmt: skip


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    silu: bool = False,
    counters: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ (+ b) for few tokens; with `silu`, SwiGLU's product of the two halves of x Wᵀ.

    x: [num_tokens, input_size]; weight: [output_size, input_size], both contiguous; counters:
    zeros, [output_size / 16] int32 or more, left zero; calls that share them must not overlap.
    """
    out = x.new_empty((len(x), len(weight) // 2 if silu else len(weight)))
    if len(x) > 1 and is_light(weight):
        launch_few(out, x, weight, bias, silu, counters)
    else:
        launch_small(out, x, weight, bias, silu)
    return out


FEW_ROWS = 64  # for a CPU


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """x Wᵀ (+ b), for any number of tokens."""
    if order_is_fixed():
        return fixed_linear(x, weight, bias)
    if is_small(x, weight):
        return small_linear(x, weight, counters=counters, bias=bias)
    if x.is_cpu and 1 < len(x) <= FEW_ROWS and x.dtype == torch.float32:
        y = F.linear(weight, x).t().contiguous()  # W xᵀ: the libraries of CPUs are quicker so
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)

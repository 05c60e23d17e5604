"""The experts' linear layers, all in one launch."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.fixed_order import order_is_fixed
from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs
from nanovllm.kernels.routing import plan
from nanovllm.kernels.silu_and_mul import silu_and_mul_torch


@triton.jit
def pairs_of_tile(
    order, starts, NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, DIRECT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The expert of this program's tile (NUM_EXPERTS: of none), its first pair, and their end.

    DIRECT: no order was made; a tile is a pair, and `order` has its expert.
    """
    tile = tl.program_id(0)
    if DIRECT:
        expert, first, end = tl.load(order + tile), tile, tile + 1
    else:
        at = tl.arange(0, PADDED)
        start = tl.load(starts + at, mask=at < NUM_EXPERTS, other=0)
        stop = tl.load(starts + at + 1, mask=at < NUM_EXPERTS, other=0)
        tiles = (stop - start + BLOCK_M - 1) // BLOCK_M
        is_before = tl.cumsum(tiles, axis=0) <= tile
        expert = tl.minimum(tl.sum(tl.where(is_before, 1, 0), axis=0), NUM_EXPERTS)
        own = tl.minimum(expert, NUM_EXPERTS - 1)
        place = tile - tl.sum(tl.where(is_before, tiles, 0), axis=0)
        first, end = tl.load(starts + own) + place * BLOCK_M, tl.load(starts + own + 1)
    return expert, first, end


@triton.jit
def products(
    x, weight, row, source, there, num_rows,
    SIZE: tl.constexpr, SILU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some rows of an expert's weights times some rows of x, [BLOCK_N, BLOCK_M] float32.

    With SILU, SwiGLU's product of these and of the rows num_rows behind them.
    """
    y, up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    column = tl.arange(0, BLOCK_K)
    weight += tl.minimum(row, num_rows - 1)[:, None].to(tl.int64) * SIZE + column[None, :]
    ups = weight + num_rows.to(tl.int64) * SIZE
    x += source[None, :].to(tl.int64) * SIZE + column[:, None]
    for at in range(0, SIZE, BLOCK_K):
        if SIZE % BLOCK_K == 0:
            a, b = tl.load(weight + at), tl.load(x + at, mask=there[None, :], other=0.0)
        else:
            inside = column + at < SIZE
            a = tl.load(weight + at, mask=inside[None, :], other=0.0)
            b = tl.load(x + at, mask=there[None, :] & inside[:, None], other=0.0)
        y = tl.dot(a, b, y, input_precision="ieee")
        if SILU:
            if SIZE % BLOCK_K == 0:
                a = tl.load(ups + at)
            else:
                a = tl.load(ups + at, mask=(column + at < SIZE)[None, :], other=0.0)
            up = tl.dot(a, b, up, input_precision="ieee")
    return y, up


@triton.jit(do_not_specialize=["num_rows"])
def grouped_linear_kernel(
    out, x, weight, order, starts, num_rows,
    SIZE: tl.constexpr, TOP: tl.constexpr, NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    SILU: tl.constexpr, DIRECT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_M pairs of one expert, and BLOCK_N rows of its weights.

    With SILU x has a row for each token, else for each place in the order; `out` the other way
    round: for each place in the order, or for each pair.
    """
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(PDL)
    expert, first, end = pairs_of_tile(order, starts, NUM_EXPERTS, PADDED, DIRECT, BLOCK_M)
    if expert < NUM_EXPERTS:
        place = first + tl.arange(0, BLOCK_M)
        there, pair = place < end, place
        if not DIRECT:
            pair = tl.load(order + place, mask=there, other=0)
        source, target = place, pair
        if SILU:
            source, target = pair // TOP, place
            weight += expert.to(tl.int64) * 2 * num_rows * SIZE
        else:
            weight += expert.to(tl.int64) * num_rows * SIZE
        y, up = products(
            x, weight, row, source, there, num_rows, SIZE, SILU, BLOCK_N, BLOCK_M, BLOCK_K
        )
        kind = out.dtype.element_ty
        if SILU:  # each step is rounded where torch rounds it
            y = y.to(kind).to(tl.float32)
            y = (y * tl.sigmoid(y)).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
        to = out + target[None, :].to(tl.int64) * num_rows + row[:, None]
        tl.store(to, y.to(kind), mask=there[None, :] & (row < num_rows)[:, None])


@triton.jit
def sum_experts_kernel(
    out, y, weights, SIZE: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program a token and BLOCK channels: what its experts say, each by its weight."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(TOP):
        said = tl.load(y + (token * TOP + i) * SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32)
        total += said * tl.load(weights + token * TOP + i).to(tl.float32)
    tl.store(out + token * SIZE + at, total.to(out.dtype.element_ty), mask=at < SIZE)


FEW = 2  # tokens up to which each pair is a tile


def tile_for(num_tokens: int, top: int, num_experts: int) -> dict[str, int]:
    """The tile by how many tokens an expert gets, and how the kernel is compiled for it.

    It is the same for all numbers of tokens between two powers of two.
    """
    share = triton.next_power_of_2(num_tokens) * top // num_experts
    if share <= 4 or order_is_fixed():
        return dict(BLOCK_N=16, BLOCK_M=16, BLOCK_K=256, num_warps=2, num_stages=3)
    if share <= 16:
        return dict(BLOCK_N=32, BLOCK_M=32, BLOCK_K=128, num_warps=4, num_stages=4)
    if share <= 64:
        return dict(BLOCK_N=64, BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=4)
    return dict(BLOCK_N=128, BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=3)


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor | None,
    shape: tuple[int, int],
    silu: bool,
) -> torch.Tensor:
    """Each pair's row of x by its expert's weights: [pairs, output_size], or half of it by SwiGLU.

    weight: [num_experts, output_size, input_size]; order, starts: from `plan`, or the pairs'
    experts and None; shape: tokens, and experts of each.
    """
    (num_experts, num_rows, size), (num_tokens, top), pdl = weight.shape, shape, overlaps(x)
    num_rows = num_rows // 2 if silu else num_rows
    tile, pairs = tile_for(num_tokens, top, num_experts), num_tokens * top
    tile = {**tile, "BLOCK_K": tile["BLOCK_K"] * 2 // x.element_size()}  # as many bytes
    # No more tiles than pairs, and of each expert at most one that is not full.
    num_tiles = pairs if starts is None else min(pairs, pairs // tile["BLOCK_M"] + num_experts)
    out = x.new_empty((pairs, num_rows))
    grouped_linear_kernel[num_tiles, triton.cdiv(num_rows, tile["BLOCK_N"])](
        out, x, weight, order, order if starts is None else starts, num_rows, SIZE=size, TOP=top,
        NUM_EXPERTS=num_experts, PADDED=triton.next_power_of_2(num_experts), SILU=silu,
        DIRECT=starts is None, PDL=pdl, launch_pdl=pdl, **tile,
    )  # fmt: skip
    return out


def run_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What each token's experts, each a SwiGLU MLP, make of it, added up by their weights.

    x: [num_tokens, hidden_size] -> the same shape; gate_up: [num_experts, 2 * size, hidden_size];
    down: [num_experts, hidden_size, size]; experts, weights: from `route`.
    """
    if not uses_triton(x):
        return run_experts_torch(x, gate_up, down, experts, weights)
    shape, starts, order = (experts.shape[0], experts.shape[1]), None, experts
    if len(x) > FEW:
        order, starts = plan(experts, len(gate_up))
    inner = grouped_linear(x, gate_up, order, starts, shape, silu=True)
    y = grouped_linear(inner, down, order, starts, shape, silu=False)
    out, size, pdl = torch.empty_like(x), x.shape[1], overlaps(x)
    sum_experts_kernel[len(x), triton.cdiv(size, 1024)](
        out, y, weights, SIZE=size, TOP=shape[1], BLOCK=1024, PDL=pdl, launch_pdl=pdl, num_warps=4
    )
    return out


def run_experts_torch(x, gate_up, down, experts, weights) -> torch.Tensor:
    """The same in torch, expert by expert."""
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, place = (experts == expert).nonzero(as_tuple=True)
        inner = silu_and_mul_torch(F.linear(x[token], gate_up[expert]))
        y = F.linear(inner, down[expert]) * weights[token, place].unsqueeze(1)
        out.index_add_(0, token, y)
    return out

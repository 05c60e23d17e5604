"""The residual add and the RMSNorm after it, in one pass over the stream."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs


@triton.jit
def add_rms_norm_kernel(
    out, total, x, residual, weight, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    there = at < SIZE
    scale = tl.load(weight + at, mask=there).to(tl.float32)
    wait_for_inputs(PDL)
    stream = tl.load(x + token * SIZE + at, mask=there, other=0.0)
    if ADD:
        other = tl.load(residual + token * SIZE + at, mask=there, other=0.0)
        stream = (stream.to(tl.float32) + other.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + token * SIZE + at, stream, mask=there)
    stream = stream.to(tl.float32)
    stream *= tl.rsqrt(tl.sum(stream * stream, axis=0) / SIZE + eps)
    tl.store(out + token * SIZE + at, (stream * scale).to(out.dtype.element_ty), mask=there)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch to the stream; returns the normalised stream and the stream itself.

    x, residual: [num_tokens, size], contiguous; None for a stream that begins with x. The sum is
    rounded to the stream's type, then normalised in float32.
    """
    if not uses_triton(x):
        return add_rms_norm_torch(x, residual, weight, eps)
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    size, pdl = x.shape[-1], overlaps(x)
    padded = triton.next_power_of_2(size)
    add_rms_norm_kernel[len(x),](
        out, total, x, x if residual is None else residual, weight, eps,
        SIZE=size, PADDED=padded, ADD=residual is not None, PDL=pdl, launch_pdl=pdl,
        num_warps=min(max(padded // 512, 1), 8),
    )  # fmt: skip
    return out, total


def add_rms_norm_torch(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total

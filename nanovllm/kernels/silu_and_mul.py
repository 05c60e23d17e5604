"""SwiGLU's product, from the merged projection."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs

BLOCK = 1024


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020). gate_up: [num_tokens, 2 * size], contiguous -> [.., size]"""
    if not uses_triton(gate_up):
        return silu_and_mul_torch(gate_up)
    num_tokens, size = len(gate_up), gate_up.shape[1] // 2
    out, pdl = gate_up.new_empty((num_tokens, size)), overlaps(gate_up)
    silu_and_mul_kernel[num_tokens, triton.cdiv(size, BLOCK)](
        out, gate_up, size, BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=4
    )
    return out


def silu_and_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def silu_and_mul_kernel(out, gate_up, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a token and BLOCK channels."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    wait_for_inputs(PDL)
    gate = tl.load(gate_up + token * 2 * size + at, mask=there).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * size + at, mask=there).to(tl.float32)
    # as torch does it: silu in float32, rounded, then the product
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * size + at, (silu * up).to(out.dtype.element_ty), mask=there)

"""Tokens that the host has not seen yet, put in where they are needed."""

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs

BLOCK = 256


def resolve_tokens(
    input_ids: torch.Tensor, sampled: torch.Tensor, history: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Replace each placeholder -1 - i by what row i of the step before has sampled.

    input_ids: [num_tokens] int64 -> the same shape; sampled: [most sequences in a step] int64.
    A sampled -1 (its logits held a NaN) becomes 0: its request will end with an error, but may have
    a row in this step. Each token is noted in its slot of `history`, [num_slots] int32; slots:
    [num_tokens] int64, -1 for none.
    """
    if not uses_triton(input_ids):
        known = sampled[(-1 - input_ids).clamp(min=0)].clamp(min=0)
        token_ids = torch.where(input_ids < 0, known, input_ids)
        history[slots[slots >= 0]] = token_ids[slots >= 0].int()
        return token_ids
    out, pdl = torch.empty_like(input_ids), overlaps(input_ids)
    resolve_tokens_kernel[triton.cdiv(len(input_ids), BLOCK),](
        out, history, slots, input_ids, sampled, len(input_ids),
        BLOCK=BLOCK, PDL=pdl, launch_pdl=pdl, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def resolve_tokens_kernel(
    out, history, slots, input_ids, sampled, num_tokens, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program BLOCK tokens."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < num_tokens
    wait_for_inputs(PDL)
    token, slot = tl.load(input_ids + at, mask=there, other=0), tl.load(slots + at, there, -1)
    known = tl.load(sampled - 1 - token, mask=there & (token < 0), other=0)
    token = tl.where(token < 0, tl.maximum(known, 0), token)
    tl.store(out + at, token, mask=there)
    tl.store(history + slot, token.to(tl.int32), mask=slot >= 0)

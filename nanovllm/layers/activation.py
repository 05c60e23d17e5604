"""Activations."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product: silu(gate) * up (Shazeer 2020). All [num_tokens, intermediate_size]."""
    return F.silu(gate) * up

"""Activations."""

import torch
from torch import nn

from nanovllm.kernels.silu_and_mul import silu_and_mul


class SiluAndMul(nn.Module):
    """SwiGLU's product: silu(gate) * up (Shazeer 2020)."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up, side by side: [num_tokens, 2 * intermediate_size] -> the half of it"""
        return silu_and_mul(gate_up)

"""A mixture of experts: many MLPs, of which each token takes a few."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.kernels.grouped_linear import run_experts
from nanovllm.layers.layer import Layer, shape_of


class Experts(Layer):
    """The experts' matrices, each kind in one tensor. Cut by each expert's inner channels."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        number, size = config.num_experts or 0, config.moe_intermediate_size or 0
        self.gate_up_proj = nn.Parameter(torch.empty(number, 2 * size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(number, config.hidden_size, size))

    def stored_parts(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The names under which a checkpoint has the parts of a parameter, and their memory."""
        for number, matrix in enumerate(getattr(self, kind)):
            if kind == "down_proj":
                yield f"{number}.down_proj.weight", matrix
            else:
                yield f"{number}.gate_proj.weight", matrix.chunk(2)[0]
                yield f"{number}.up_proj.weight", matrix.chunk(2)[1]

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """This rank's channels: columns of the last matrix, rows of the first two."""
        own, dim = self.down_proj.shape[2], 1 if kind == "down_proj" else 0
        if shape_of(stored)[dim] != own * self.group.size:
            return stored[...]
        part = slice(self.group.rank * own, (self.group.rank + 1) * own)
        return stored[:, part] if dim else stored[part]

    def forward(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same shape, this rank's part"""
        return run_experts(x, self.gate_up_proj, self.down_proj, experts, weights)

"""Linear layers."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.small_linear import is_small, small_linear


class Linear(nn.Module):
    """y = x Wᵀ (+ b). The parameters start out unset: a checkpoint fills them.

    x: [num_tokens, input_size] -> [num_tokens, output_size]
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.empty(output_size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None and is_small(x):
            return small_linear(x, self.weight)
        return F.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several layers with the same input as one matrix; a checkpoint has them one by one.

    x: [num_tokens, input_size] -> their outputs side by side.
    """

    def __init__(self, input_size: int, output_sizes: dict[str, int], bias: bool = False):
        """`output_sizes`: the size of each part, under the name that checkpoints give it."""
        super().__init__(input_size, sum(output_sizes.values()), bias)
        self.output_sizes = output_sizes

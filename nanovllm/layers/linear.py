"""Linear layers, by how several GPUs share them."""

from typing import Any

import torch
from torch import nn

from nanovllm.kernels.small_linear import is_small, linear, small_linear
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.layer import Layer, shape_of


class ReplicatedLinear(Layer):
    """y = x Wᵀ (+ b), whole on every GPU. The parameters start out unset: a checkpoint fills them.

    x: [num_tokens, input_size] -> [num_tokens, output_size]
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        self.bias = nn.Parameter(torch.empty(output_size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class ColumnParallelLinear(ReplicatedLinear):
    """Cut by its outputs: a GPU holds some rows of W, for outputs that are worked on apart."""

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """This rank's rows; all of a tensor that is not as large as it should be."""
        own, rest = divmod(shape_of(stored)[0], self.group.size)
        if rest or own not in getattr(self, "output_sizes", [len(self.weight)]):
            return stored[...]
        return stored[self.group.rank * own : (self.group.rank + 1) * own]


class RowParallelLinear(ReplicatedLinear):
    """Cut by its inputs: a GPU holds the columns of W for what the layer before it made there.

    What the GPUs get are parts of a sum. The norm that follows adds them up.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = False):
        super().__init__(input_size, output_size, bias)
        self.counters: torch.Tensor
        counters = torch.zeros(-(-output_size // 16), dtype=torch.int32)
        self.register_buffer("counters", counters, persistent=False)

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """This rank's columns; the bias is whole, and is added once."""
        own = self.weight.shape[1]
        if kind == "bias" or shape_of(stored)[1:] != [own * self.group.size]:
            return stored[...]
        return stored[:, self.group.rank * own : (self.group.rank + 1) * own]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, own input_size] -> [num_tokens, output_size], this rank's part"""
        bias = self.bias if self.group.rank == 0 else None
        return linear(x, self.weight, bias, self.counters)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several layers with the same input as one matrix; a checkpoint has them one by one.

    x: [num_tokens, input_size] -> their outputs side by side. Each part is cut by itself.
    """

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = False):
        super().__init__(input_size, sum(output_sizes), bias)
        self.output_sizes = output_sizes

    def part(self, kind: str, index: int) -> torch.Tensor:
        """The memory of one part of a parameter, "weight" or "bias"."""
        return getattr(self, kind).split(self.output_sizes)[index]

    def forward(self, x: torch.Tensor, activation: SiluAndMul | None = None) -> torch.Tensor:
        """The parts' outputs, or what an activation makes of them."""
        if activation is None:
            return super().forward(x)
        if self.bias is None and is_small(x, self.weight):
            return small_linear(x, self.weight, silu=True)
        return activation(super().forward(x))


class QKVParallelLinear(MergedColumnParallelLinear):
    """The queries, keys and values of attention, side by side. Cut by heads."""

    def __init__(
        self, hidden_size: int, head_dim: int, num_heads: int, num_kv_heads: int, bias: bool = False
    ):
        sizes = [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)]
        super().__init__(hidden_size, sizes, bias)
        self.head_dim, self.num_kv_heads = head_dim, num_kv_heads

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """This rank's heads; where there are fewer heads than ranks, the one that it shares."""
        ranks, (num_heads, rest) = self.group.size, divmod(shape_of(stored)[0], self.head_dim)
        is_shared = self.num_kv_heads == 1 and 0 < num_heads < ranks and ranks % num_heads == 0
        if rest or not is_shared:
            return super().take(kind, stored)
        first = self.group.rank * num_heads // ranks
        return stored[first * self.head_dim : (first + 1) * self.head_dim]

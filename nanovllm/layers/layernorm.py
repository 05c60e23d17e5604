"""Root-mean-square normalisation."""

import torch
from torch import nn

from nanovllm.kernels.add_rms_norm import add_rms_norm
from nanovllm.layers.layer import Layer


class RMSNorm(Layer):
    """Divide each vector by its root mean square, then scale each channel (Zhang & Sennrich 2019).

    The mean is taken in float32 whatever the type of x.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add x, summed over the ranks, to the stream; returns that normalised, and the stream.

        x: [num_tokens, size], this rank's part; the stream is the same on all ranks. None for a
        stream that begins with x, which is whole.
        """
        if stream is not None and self.group.size > 1:
            if self.group.is_near(x):
                return self.group.exchange.all_reduce(x, stream, self.weight, self.eps)
            x = self.group.all_reduce(x)
        return add_rms_norm(x, stream, self.weight, self.eps)

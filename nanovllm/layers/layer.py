"""What all layers that have weights share."""

from typing import Any

import torch
from torch import nn

from nanovllm.parallel.group import get_group


class Layer(nn.Module):
    """A module whose parameters a checkpoint fills, and which nobody reads but the module itself.

    So what they look like in memory, cut up or in fewer bits, is its own business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group = get_group()

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """What of a checkpoint's tensor is this rank's own: here all of it.

        kind: "weight" or "bias". `stored` is a tensor, or a slice of a file, of which only what is
        indexed is read.
        """
        return stored[...]


def shape_of(stored: Any) -> list[int]:
    """The shape of a tensor, or of a slice of a file."""
    return list(stored.shape) if isinstance(stored, torch.Tensor) else stored.get_shape()

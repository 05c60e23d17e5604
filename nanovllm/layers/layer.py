"""What all layers that have weights share."""

from typing import Any

import torch
from torch import nn


class Layer(nn.Module):
    """A module whose parameters a checkpoint fills, and which nobody reads but the module itself.

    So what they look like in memory, cut up or in fewer bits, is its own business.
    """

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """What of a checkpoint's tensor is this layer's own: on one GPU all of it.

        kind: "weight" or "bias". `stored` is a tensor, or a slice of a file, of which only what is
        indexed is read.
        """
        return stored[...]

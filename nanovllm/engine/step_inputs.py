"""A step's inputs, all in one buffer: one copy brings them to the device."""

from typing import Any, NamedTuple

import numpy as np
import torch

DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}
ALIGNMENT = 16  # bytes; a kernel is compiled anew for a pointer that is aligned otherwise


class Shape(NamedTuple):
    """The size of a step."""

    num_tokens: int
    num_seqs: int

    @property
    def is_decode(self) -> bool:
        """Does each sequence bring one token?"""
        return self.num_tokens == self.num_seqs

    def fits(self, other: "Shape") -> bool:
        """Can a step of this shape be padded to the other?"""
        return all(a <= b for a, b in zip(self, other, strict=True)) and (
            self.is_decode or not other.is_decode
        )


Inputs = dict[str, torch.Tensor]


class InputLayout:
    """Where in the buffer each input of a step of some shape lies."""

    def __init__(self, shape: Shape, max_blocks: int):
        tokens, seqs = shape
        self.fields = {  # name: (type, number of elements)
            "input_ids": (np.int64, tokens),  # -1 - i: what row i of the step before samples
            "positions": (np.int64, tokens),
            "slot_mapping": (np.int64, tokens),  # -1: not to be stored
            "seeds": (np.int64, seqs),
            "lengths": (np.int64, seqs),  # with the tokens that are not computed
            "last": (np.int64, seqs),  # which of the step's tokens is the sequence's last
            "temperatures": (np.float32, seqs),
            "context_lens": (np.int32, seqs),  # 0: a row that is padding
            "cu_seqlens": (np.int32, seqs + 1),
            "order": (np.int32, seqs),  # the decodes, the longest first
            "block_tables": (np.int32, seqs * max_blocks),
        }
        self.offsets, self.num_bytes = {}, 0
        for name, (kind, count) in self.fields.items():
            self.offsets[name] = self.num_bytes
            self.num_bytes += -(-count * np.dtype(kind).itemsize // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: np.ndarray | torch.Tensor) -> dict[str, Any]:
        """The inputs in a buffer of bytes: arrays in an array, tensors in a tensor."""
        is_tensor, at = isinstance(buffer, torch.Tensor), self.offsets
        return {
            name: buffer[at[name] : at[name] + count * np.dtype(kind).itemsize].view(
                DTYPES[kind] if is_tensor else kind
            )
            for name, (kind, count) in self.fields.items()
        }

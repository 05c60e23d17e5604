"""A step's inputs, all in one buffer: one copy brings them to the device."""

from typing import Any, NamedTuple

import numpy as np
import torch

from nanovllm.engine.sequence import Sequence

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
            "block_tables": (np.int32, seqs * max_blocks),  # -1: no block
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


def scheduled_tokens(seqs: list[Sequence]) -> list[int]:
    """The tokens that the sequences bring, one after another; 0 for one that is gone."""
    input_ids: list[int] = []
    for seq in seqs:
        start, count = seq.num_computed_tokens, seq.num_scheduled_tokens
        tokens = seq.token_ids[start : start + count]
        input_ids += tokens
        input_ids += [0] * (count - len(tokens))  # those behind keep their places
    return input_ids


def slot_mapping(
    seqs: list[Sequence],
    tables: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """Each token's slot, [num_tokens] int64; -1 for one that is kept already, or has no block.

    tables: [num_seqs, max_blocks], -1 where there is no block; row, position: [num_tokens], whose
    each token is, and where in the text.
    """
    kept = np.array([seq.num_cached_tokens for seq in seqs], dtype=np.int64)
    block = tables[row, position // block_size].astype(np.int64)
    slot = block * block_size + position % block_size
    return np.where((block < 0) | (position < kept[row]), -1, slot)

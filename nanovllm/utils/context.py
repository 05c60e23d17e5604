"""What attention needs to know about the batch that is being run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

# Decode attention counts parts where there are few rows: fewer than twice the multiprocessors.
NUM_COUNTERS = 1 << 10


@dataclass(slots=True)
class Context:
    """What a step's sequences bring, and where their keys and values lie.

    First come the sequences that bring one token each (decode), then those that bring several.
    """

    slot_mapping: torch.Tensor  # [num_tokens] int64: each token's slot; -1 is nobody's
    block_tables: torch.Tensor  # [num_seqs, max_blocks]; -1: no block
    context_lens: torch.Tensor  # [num_seqs]: tokens that the newest token sees, itself included
    cu_seqlens: torch.Tensor  # [num_seqs + 1]: sequence i brings the tokens [cu[i], cu[i + 1])
    num_decodes: int = 0
    max_new: int = 1  # the most tokens that a sequence brings
    known: dict[Any, Any] = field(default_factory=dict)  # what all layers of a step ask for
    order: torch.Tensor | None = None  # the decodes, the longest first, [num_decodes] int32
    counters: torch.Tensor | None = None  # zeros that decode attention leaves zero, int32

    def lists(self) -> tuple[list[int], list[int]]:
        """`context_lens` and `cu_seqlens` for a loop on the host; the device is asked once."""
        if "lists" not in self.known:
            self.known["lists"] = self.context_lens.tolist(), self.cu_seqlens.tolist()
        return self.known["lists"]

    def slots(self, start: int, stop: int, block_size: int) -> torch.Tensor:
        """Where the tokens of sequences start … stop - 1 lie, [stop - start, longest] int64.

        Where there is no block, some slot that exists: a mask hides what lies there.
        """
        if (start, stop) not in self.known:
            tables, lens = self.block_tables[start:stop], self.lists()[0][start:stop]
            position = torch.arange(max(lens), device=tables.device)
            blocks = tables[:, position // block_size].long().clamp(min=0)
            self.known[start, stop] = blocks * block_size + position % block_size
        return self.known[start, stop]

    def decode_mask(self) -> torch.Tensor | None:
        """True where a decode has a token, [num_decodes, 1, 1, longest]; None: all are as long."""
        if "mask" not in self.known:
            lens, mask = self.lists()[0][: self.num_decodes], None
            if min(lens) < max(lens):
                column = torch.arange(max(lens), device=self.context_lens.device)
                mask = column < self.context_lens[: self.num_decodes].unsqueeze(1)
                mask = mask[:, None, None]
            self.known["mask"] = mask
        return self.known["mask"]


# Each thread has its own: engines in several threads run at the same time.
_context: ContextVar[Context | None] = ContextVar("context", default=None)


def get_context() -> Context:
    """The batch that this thread runs; RuntimeError outside of a step."""
    context = _context.get()
    if context is None:
        raise RuntimeError("no batch is being run: enter set_context() first")
    return context


@contextmanager
def set_context(context: Context) -> Iterator[None]:
    """Make `context` the batch that this thread runs, for the length of a `with`; no nesting."""
    if _context.get() is not None:
        raise RuntimeError("a batch is being run already")
    _context.set(context)
    try:
        yield
    finally:
        reset_context()


def reset_context() -> None:
    """This thread runs no batch any more."""
    _context.set(None)

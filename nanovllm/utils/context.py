"""What attention needs to know about the batch that is being run."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

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
    context_lens: list[int]  # tokens that each sequence's newest token sees, itself included
    mask: torch.Tensor | None = None  # decode: [num_decodes, 1, 1, max_context_len]; None: see all
    num_decodes: int = 0
    cu_seqlens: list[int] | None = None  # sequence i owns tokens [cu[i], cu[i + 1]); None: one each
    known_slots: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    lens: torch.Tensor | None = None  # context_lens on the device, [num_seqs] int32
    starts: torch.Tensor | None = None  # cu_seqlens on the device, [num_seqs + 1] int32
    order: torch.Tensor | None = None  # the decodes, the longest first, [num_decodes] int32
    counters: torch.Tensor | None = None  # zeros that decode attention leaves zero, int32

    @property
    def max_new(self) -> int:
        """The most tokens that a sequence brings."""
        return max((b - a for a, b in itertools.pairwise(self.cu_seqlens)), default=0)

    def __post_init__(self):
        """What kernels read has to lie on the device before the step begins."""
        if self.lens is None:
            kind = dict(dtype=torch.int32, device=self.slot_mapping.device)
            self.lens = torch.tensor(self.context_lens, **kind)
            self.order = self.lens[: self.num_decodes].argsort(descending=True).int()
            self.counters = torch.zeros(NUM_COUNTERS, **kind)
            if self.cu_seqlens is not None:
                self.starts = torch.tensor(self.cu_seqlens, **kind)

    def slots(self, start: int, stop: int, block_size: int) -> torch.Tensor:
        """Where the tokens of sequences start … stop - 1 lie, [stop - start, longest] int64.

        Where there is no block, some slot that exists: a mask hides what lies there. All layers of
        a step ask the same, so the answer is kept.
        """
        if (start, stop) not in self.known_slots:
            tables, lens = self.block_tables[start:stop], self.context_lens[start:stop]
            position = torch.arange(max(lens), device=tables.device)
            blocks = tables[:, position // block_size].clamp(min=0)
            self.known_slots[start, stop] = blocks * block_size + position % block_size
        return self.known_slots[start, stop]


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
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)

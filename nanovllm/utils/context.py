"""What attention needs to know about the batch that is being run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Context:
    """Which sequence each token of a step belongs to, and where its keys and values go."""

    slot_mapping: torch.Tensor  # [num_tokens] int64: the token's slot in the cache
    cu_seqlens: list[int] | None = None  # prefill: sequence i owns tokens [cu[i], cu[i + 1])
    mask: torch.Tensor | None = None  # decode: [num_seqs, 1, 1, max_context_len], True is visible
    max_context_len: int = 0  # decode: the longest context of the batch

    @property
    def is_prefill(self) -> bool:
        """True where whole prompts are run, False where each sequence brings one token."""
        return self.cu_seqlens is not None


_context: Context | None = None


def get_context() -> Context:
    """The batch that is being run; RuntimeError outside of a step."""
    if _context is None:
        raise RuntimeError("no batch is being run: enter set_context() first")
    return _context


@contextmanager
def set_context(context: Context) -> Iterator[None]:
    """Make `context` the batch that is being run, for the length of a `with`; no nesting."""
    global _context
    if _context is not None:
        raise RuntimeError("a batch is being run already")
    _context = context
    try:
        yield
    finally:
        _context = None

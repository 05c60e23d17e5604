"""Whether sums are to be added up in an order that does not depend on the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_counters: ContextVar[torch.Tensor | None] = ContextVar("counters", default=None)


@contextmanager
def fixed_order(counters: torch.Tensor | None) -> Iterator[None]:
    """Let this thread's kernels add up in a fixed order, for the length of a `with`; None: not.

    counters: zeros, [MOST_TILES] int32 on the device, which are left zero.
    """
    token = _counters.set(counters)
    try:
        yield
    finally:
        _counters.reset(token)


def order_is_fixed() -> bool:
    """Is this thread's order fixed?"""
    return _counters.get() is not None


def fixed_counters() -> torch.Tensor:
    """The counters that `fixed_order` was entered with."""
    counters = _counters.get()
    assert counters is not None
    return counters

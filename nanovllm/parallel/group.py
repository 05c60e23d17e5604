"""The ranks that share a model, and what they tell one another."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from nanovllm.parallel.exchange import open_exchange
from nanovllm.parallel.links import Gloo, Nccl


@dataclass(slots=True)
class Group:
    """A rank's place among `size`, and its way to the others."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    came: np.ndarray | None = None  # how many exchanges each rank has come to, seen by all
    link: Any = None  # to the other ranks, once they have met
    exchange: Any = None  # a faster one, where kernels can write into each other's memory
    patience: timedelta = timedelta(minutes=10)  # then a rank that does not come is given up

    def note(self) -> None:
        """This rank has come to one more exchange."""
        if self.came is not None:
            self.came[self.rank] += 1

    def abort(self) -> None:
        """Let go of what waits on a GPU for a rank that does not come; from any thread."""
        if self.exchange is not None:
            self.exchange.abort()
        if self.link is not None:
            self.link.abort()

    def is_near(self, x: torch.Tensor) -> bool:
        """Are all ranks within reach of a kernel, for a sum of x?"""
        return self.exchange is not None and self.exchange.takes(x)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, perhaps in the place of x: floats, contiguous."""
        if self.size == 1:
            return x
        self.note()
        if self.is_near(x):
            return self.exchange.all_reduce(x)[0]
        self.link.all_reduce(x, self.patience)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x side by side. [num_rows, n] -> [num_rows, size * n]"""
        if self.size == 1:
            return x
        wide = x.new_zeros(len(x), self.size, x.shape[1])
        wide[:, self.rank] = x
        return self.all_reduce(wide.flatten(1))

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        own = torch.tensor([[number]], dtype=torch.float64, device=self.device)
        return int(self.gather(own).min())


_group: ContextVar[Group | None] = ContextVar("group", default=None)


def get_group() -> Group:
    """The group whose model is being built; a group of one outside of `set_group`."""
    return _group.get() or Group()


@contextmanager
def set_group(group: Group) -> Iterator[None]:
    """Build a model for a rank of `group`, for the length of a `with`."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


MEET = timedelta(seconds=30)


def open_store(port: int = 0) -> Any:
    """The store in which ranks meet: rank 0 opens it at a free port, the others go to `port`."""
    from torch.distributed import TCPStore

    is_new = port == 0
    return TCPStore(
        "127.0.0.1", port, is_master=is_new, timeout=Group().patience, wait_for_workers=False
    )


def join(group: Group, store: Any) -> None:
    """Link a rank to the others: by NCCL on GPUs, by gloo on CPUs. All have opened the store."""
    from torch.distributed import PrefixStore

    store.set_timeout(MEET)  # they are all there, so this takes a moment
    rank, size = group.rank, group.size
    if group.device.type == "cpu":
        group.link = Gloo(rank, size, PrefixStore("gloo", store), MEET)
        return
    with torch.cuda.device(group.device):
        group.link = Nccl(rank, size, PrefixStore("nccl", store))
        group.exchange = open_exchange(rank, size, group.device, PrefixStore("exchange", store))

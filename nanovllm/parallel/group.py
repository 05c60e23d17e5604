"""The ranks that share a model, and what they tell one another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.distributed import distributed_c10d


@dataclass(slots=True)
class Group:
    """A rank's place among `size`, and its way to the others."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    came: np.ndarray | None = None  # how many exchanges each rank has come to, seen by all
    link: Any = None  # torch's process group, once the ranks have met
    patience: timedelta = timedelta(minutes=10)  # then a rank that does not come is given up

    def note(self) -> None:
        """This rank has come to one more exchange."""
        if self.came is not None:
            self.came[self.rank] += 1

    def abort(self) -> None:
        """Let go of what waits on a GPU for a rank that does not come; from any thread."""
        if self.link is not None and self.device.type == "cuda":
            self.link.abort()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in the place of x."""
        if self.size > 1:
            self.note()
            options = distributed_c10d.AllreduceOptions()
            options.timeout = self.patience
            with others_are_to_blame():
                self.link.allreduce([x], options).wait()
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x side by side along the last dimension; all have one shape."""
        if self.size == 1:
            return x
        self.note()
        options = distributed_c10d.AllgatherOptions()
        options.timeout = self.patience
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with others_are_to_blame():
            self.link.allgather([parts], [x.contiguous()], options).wait()
        return torch.cat(parts, dim=-1)

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        return int(self.gather(torch.tensor([number], device=self.device)).min())


class RankLost(RuntimeError):
    """An exchange broke off: another rank has ended, or has not come in time."""


@contextmanager
def others_are_to_blame() -> Iterator[None]:
    """Make a RankLost of what torch raises in an exchange."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error)) from None


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
# torch would end the process in which an exchange of NCCL's fails.
LEAVE_IT_TO_US = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


def open_store(port: int = 0) -> Any:
    """The store in which ranks meet: rank 0 opens it at a free port, the others go to `port`."""
    from torch.distributed import TCPStore

    is_new = port == 0
    return TCPStore(
        "127.0.0.1", port, is_master=is_new, timeout=Group().patience, wait_for_workers=False
    )


def join(group: Group, store: Any) -> None:
    """Link a rank to the others: by NCCL on GPUs, by gloo on CPUs. All have opened the store."""
    from torch import distributed

    store.set_timeout(MEET)  # they are all there, so this takes a moment
    store = distributed.PrefixStore("ranks", store)
    if group.device.type == "cuda":
        with patch.dict(os.environ, LEAVE_IT_TO_US):
            options = distributed.ProcessGroupNCCL.Options()
            group.link = distributed.ProcessGroupNCCL(store, group.rank, group.size, options)
        return
    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = MEET
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    group.link = gloo(store, group.rank, group.size, options)

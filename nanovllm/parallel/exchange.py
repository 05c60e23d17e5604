"""What the ranks of one machine write into the memory of each other's GPUs."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from nanovllm.kernels.all_reduce import all_reduce

PAGE = 2**21


def call(function: Any, *args: Any) -> Any:
    """What a function of CUDA's returns; RuntimeError where it fails."""
    error, *rest = function(*args)
    if int(error):
        raise RuntimeError(f"{function.__name__}: {error.name}")
    return rest[0] if rest else None


class Inbox:
    """Bytes on this rank's GPU, zeros at first, that the kernels of all ranks can write.

    RuntimeError where CUDA does not allow it. All ranks make theirs at the same time.
    """

    def __init__(self, rank: int, size: int, num_bytes: int, store: Any):
        self.cuda = cuda = import_module("cuda.bindings.runtime")
        num_bytes = -(-num_bytes // PAGE) * PAGE  # what is shared is whole pages
        self.own = int(call(cuda.cudaMalloc, num_bytes))
        call(cuda.cudaMemset, self.own, 0, num_bytes)
        torch.cuda.synchronize()  # it is empty before anybody can write
        store.set(str(rank), bytes(call(cuda.cudaIpcGetMemHandle, self.own).reserved))
        self.addresses = [self.own] * size  # on this GPU, of every rank's
        for other in {*range(size)} - {rank}:
            handle = cuda.cudaIpcMemHandle_t()
            handle.reserved = store.get(str(other))
            flag = cuda.cudaIpcMemLazyEnablePeerAccess
            self.addresses[other] = int(call(cuda.cudaIpcOpenMemHandle, handle, flag))


ROWS = 2048  # of a sum over two ranks; longer messages are NCCL's
WIDEST = 16384  # numbers in a row
TAGGED_ROWS = 64  # up to so many, a number is sent with its tag


@dataclass(slots=True)
class Places:
    """The inboxes for rows of one kind."""

    inbox: Inbox
    addresses: torch.Tensor  # [ranks] int64: every rank's inbox
    counts: torch.Tensor  # [rows] int32: the exchanges that a row has had


class Exchange:
    """Sums over ranks whose GPUs can write into each other's memory; else RuntimeError."""

    def __init__(self, rank: int, size: int, device: torch.device, store: Any):
        self.rank, self.size, self.device, self.store = rank, size, device, store
        self.rows = ROWS // (size - 1)
        self.places: dict[tuple, Places] = {}
        self.stop = torch.zeros(1, dtype=torch.int32, device=device)
        self.one = torch.ones(1, dtype=torch.int32, pin_memory=True)
        self.side = torch.cuda.Stream(device)
        self.places_for(torch.empty(1, 1, device=device), tags=True)  # to see whether it works

    def places_for(self, x: torch.Tensor, tags: bool) -> Places:
        """The inboxes for x; new ones if there are none, which all ranks make together."""
        key = x.shape[1], x.dtype, tags
        if key not in self.places:
            from torch.distributed import PrefixStore

            rows = TAGGED_ROWS if tags else self.rows
            row_bytes = 2 * x[0].nbytes if tags else x[0].nbytes + 4  # a flag of 4 bytes
            store = PrefixStore(f"inbox {len(self.places)}", self.store)
            inbox = Inbox(self.rank, self.size, 2 * self.size * rows * row_bytes, store)
            addresses = torch.tensor(inbox.addresses, device=self.device)
            counts = torch.zeros(rows, dtype=torch.int32, device=self.device)
            self.places[key] = Places(inbox, addresses, counts)
        return self.places[key]

    def takes(self, x: torch.Tensor) -> bool:
        """Is x short enough, and of floats of 16 or 32 bits?"""
        return x.dim() == 2 and len(x) <= self.rows and x.shape[1] <= WIDEST and x.itemsize <= 4

    def all_reduce(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `kernels.all_reduce`, for an x that it `takes`."""
        tags = len(x) <= TAGGED_ROWS
        places = self.places_for(x, tags)
        ways = places.addresses, places.counts, self.stop
        return all_reduce(x, *ways, self.rank, tags, residual, weight, eps)

    def abort(self) -> None:
        """Let no kernel wait any longer; from any thread."""
        with torch.cuda.stream(self.side):
            self.stop.copy_(self.one, non_blocking=True)

    def close(self) -> None:
        """Give the inboxes back, once nothing on the GPU uses them."""
        torch.cuda.synchronize(self.device)
        for places in self.places.values():
            for address in {*places.inbox.addresses} - {places.inbox.own}:
                call(places.inbox.cuda.cudaIpcCloseMemHandle, address)
            call(places.inbox.cuda.cudaFree, places.inbox.own)
        self.places = {}


def open_exchange(rank: int, size: int, device: torch.device, store: Any) -> Exchange | None:
    """An exchange, or None where a rank's GPU can't be written to by the others."""
    try:
        exchange = Exchange(rank, size, device, store)
    except (ImportError, RuntimeError):
        exchange = None
    store.set(f"rank {rank}", "no" if exchange is None else "yes")
    works = all(store.get(f"rank {other}") == b"yes" for other in range(size))
    return exchange if works else None

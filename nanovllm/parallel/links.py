"""Sums over ranks by the libraries for it: gloo on CPUs, NCCL on GPUs."""

import ctypes
from datetime import timedelta
from typing import Any

import torch


class RankLost(RuntimeError):
    """An exchange broke off: another rank has ended, or has not come in time."""


class Gloo:
    """Sums over processes that talk through sockets on this machine."""

    def __init__(self, rank: int, size: int, store: Any, patience: timedelta):
        from torch.distributed import ProcessGroupGloo

        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._timeout = patience
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self.group = gloo(store, rank, size, options)

    def all_reduce(self, x: torch.Tensor, patience: timedelta) -> None:
        """The sum over all ranks, in the place of x; RankLost where one does not come."""
        from torch.distributed.distributed_c10d import AllreduceOptions

        options = AllreduceOptions()
        options.timeout = patience
        try:
            self.group.allreduce([x], options).wait()
        except RuntimeError as error:
            raise RankLost(str(error)) from None

    def abort(self) -> None:
        """The connections are closed with the processes."""


class UniqueId(ctypes.Structure):
    """What rank 0 makes and all others need to find it."""

    _fields_ = [("bytes", ctypes.c_byte * 128)]


KINDS = {torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9}  # in nccl.h


class Nccl:
    """Sums over GPUs. All ranks make theirs at the same time, each for its current device."""

    def __init__(self, rank: int, size: int, store: Any):
        self.library = ctypes.CDLL("libnccl.so.2")  # torch has loaded it
        unique_id, self.comm = UniqueId(), ctypes.c_void_p()
        if rank == 0:
            self.call("ncclGetUniqueId", ctypes.byref(unique_id))
            store.set("nccl", bytes(unique_id))
        unique_id = UniqueId.from_buffer_copy(store.get("nccl"))
        self.call("ncclCommInitRank", ctypes.byref(self.comm), size, unique_id, rank)

    def call(self, name: str, *args: Any) -> None:
        """Call a function of NCCL's; RankLost where it fails."""
        error = getattr(self.library, name)(*args)
        if error:
            raise RankLost(f"{name} returns {error}")

    def all_reduce(self, x: torch.Tensor, patience: timedelta) -> None:
        """Have the sum over all ranks take the place of x, in the current stream."""
        if not self.comm:
            raise RankLost("the ranks have parted")
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        at, count = ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(x.numel())
        self.call("ncclAllReduce", at, at, count, KINDS[x.dtype], 0, self.comm, stream)

    def abort(self) -> None:
        """End what waits on the GPU, and all further sums; from any thread."""
        comm, self.comm = self.comm, ctypes.c_void_p()
        if comm:
            self.call("ncclCommAbort", comm)

"""How long a sum over GPUs takes in a recorded step: NCCL, torch's symmetric memory, and ours.

    python book/measure/all_reduce.py [NUM_GPUS] [> all_reduce.json]

Needs two GPUs or more. Each size is checked against NCCL first. Microseconds, medians of 15
replays of 60 sums, and sums with the residual add and the RMSNorm that follow.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Event
from typing import Any

import torch
from torch.testing import assert_close

from nanovllm.kernels.add_rms_norm import add_rms_norm
from nanovllm.parallel import exchange
from nanovllm.parallel.group import Group, join, open_store
from nanovllm.parallel.workers import Workers

SHAPES = [  # rows, and numbers of 16 bits in a row: a step's tokens, and the hidden size
    *((1, 1024), (16, 1024), (256, 1024)),
    *((n, 4096) for n in (1, 4, 16, 64, 128, 256, 512)),
]
NUM_SUMS = 60
PATIENCE = timedelta(seconds=30)


@dataclass
class Measurement:
    """One rank's part in it, in a process of its own."""

    rank: int
    size: int
    port: int

    def __call__(self) -> None:
        self.measure(open_store(self.port))
        Event().wait()  # to be killed

    def measure(self, store) -> list[dict]:
        """A row of figures for each shape."""
        torch.cuda.set_device(self.rank)
        self.store = store
        self.group = Group(self.rank, self.size, torch.device("cuda", self.rank))
        join(self.group, store)
        rows = [self.row(*shape) for shape in SHAPES]
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        torch.distributed.init_process_group(
            "nccl", store=torch.distributed.PrefixStore("torch", store),
            rank=self.rank, world_size=self.size, device_id=self.group.device,
        )  # fmt: skip
        return [{**row, **self.torchs(*shape)} for row, shape in zip(rows, SHAPES, strict=True)]

    def row(self, num_rows: int, size: int) -> dict:
        """Check the sums of one shape, and time them."""
        group, device = self.group, self.group.device
        torch.manual_seed(self.rank)
        x = torch.randn(num_rows, size, device=device, dtype=torch.bfloat16)
        torch.manual_seed(self.size)  # what follows is the same on all ranks
        residual, weight = torch.randn_like(x), torch.randn(size, device=device, dtype=x.dtype)
        exact, y = x.float(), x.clone()
        group.link.all_reduce(exact, PATIENCE)
        ours = partial(group.exchange.all_reduce, x)
        fused = partial(ours, residual, weight, 1e-6)
        nccl = partial(group.link.all_reduce, y, PATIENCE)
        assert_close(ours()[0], exact.bfloat16())
        normed, stream = fused()
        assert_close(stream, exact.bfloat16() + residual)
        assert_close(normed, add_rms_norm(exact.bfloat16(), residual, weight, 1e-6)[0])
        return {
            "num_rows": num_rows,
            "size": size,
            "nccl": self.time(nccl),
            "nccl, add and norm": self.time(
                lambda: (nccl(), add_rms_norm(y, residual, weight, 1e-6))
            ),
            **self.both_kinds(x, residual, weight, 1e-6),
            "add and norm": self.time(lambda: add_rms_norm(y, residual, weight, 1e-6)),
        }

    def both_kinds(self, x: torch.Tensor, *add_and_norm: Any) -> dict[str, float]:
        """Ours, with tags and with flags."""
        times, place, most = {}, (self.group.rank, self.size, x.device), exchange.TAGGED_ROWS
        for kind, limit in (("tags", len(x)), ("flags", 0)):
            store = torch.distributed.PrefixStore(f"{kind} {x.shape}", self.store)
            ours = partial(exchange.Exchange(*place, store).all_reduce, x)
            exchange.TAGGED_ROWS = limit
            fused = partial(ours, *add_and_norm)
            times[f"ours, {kind}"] = self.time(ours)
            times[f"ours, {kind}, with add and norm"] = self.time(fused)
        exchange.TAGGED_ROWS = most
        return times

    def torchs(self, num_rows: int, size: int) -> dict[str, float]:
        """The sums of torch's symmetric memory."""
        from torch.distributed import _symmetric_memory as symmetric

        name = torch.distributed.group.WORLD.group_name
        device = self.group.device
        shared = symmetric.empty(num_rows * size, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(shared, name)
        one, two = torch.ops.symm_mem.one_shot_all_reduce, torch.ops.symm_mem.two_shot_all_reduce_
        return {
            "torch, one shot": self.time(lambda: one(shared, "sum", name)),
            "torch, two shots": self.time(lambda: two(shared, "sum", name)),
        }

    def time(self, run: Callable[[], object]) -> float:
        """Microseconds of one of many recorded runs."""
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(NUM_SUMS):
                run()
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(15):
            self.group.least(0)  # all are here
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1000 * start.elapsed_time(end) / NUM_SUMS)
        return round(statistics.median(times), 2)


def main() -> None:
    """Start the other ranks, measure, and print a JSON object."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else torch.cuda.device_count()
    store, workers = open_store(), Workers(on_loss=lambda: os._exit(1))
    workers.start([Measurement(rank, size, store.port) for rank in range(1, size)], fds=[])
    rows = Measurement(0, size, store.port).measure(store)
    workers.is_ending = True
    workers.kill()
    card = {"device": torch.cuda.get_device_name(), "num_gpus": size, "torch": torch.__version__}
    print(json.dumps({**card, "rows": rows}))
    os._exit(0)


if __name__ == "__main__":
    from all_reduce import main  # so that a worker finds what it is told to do

    main()

"""How long something takes, on a GPU or on a CPU."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

ON_GPU = torch.cuda.is_available()
ROUNDS = 5


def seconds(function: Callable[[int], object], copies: int = 1) -> float:
    """Seconds of one call of `function(i)`, i from 0 to `copies` - 1; the median of five rounds.

    On a GPU the calls are recorded and replayed, so that nothing of the host is measured; give
    it as many copies of its data as outgrow the cache of the chip, if memory is what you measure.
    """
    function(0)
    if not ON_GPU:
        rounds = []
        for _ in range(ROUNDS):
            start = perf_counter()
            for i in range(copies):
                function(i)
            rounds.append((perf_counter() - start) / copies)
        return statistics.median(rounds)
    repeats = max(1, 20 // copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for i in range(copies):
                function(i)
    graph.replay()
    rounds = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        rounds.append(start.elapsed_time(stop) / 1000 / (repeats * copies))
    return statistics.median(rounds)


def host_seconds(function: Callable[[], object], calls: int = 200) -> float:
    """Seconds that the host needs for one call, which is what launching it costs."""
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(calls):
        function()
    took = perf_counter() - start
    if ON_GPU:
        torch.cuda.synchronize()
    return took / calls


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries write to the process's stderr is lost for the length of a `with`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

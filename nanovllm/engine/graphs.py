"""Steps that are recorded once, and replayed with one call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanovllm.engine.memory import reserved_memory
from nanovllm.engine.step_inputs import Inputs, Shape, Step

MAX_PREFILL_SEQS = 8  # in a step with a prompt that is recorded
PREFILL_SIZES = (64, 128, 256, 512, 1024, 2048)  # its tokens


def graph_shapes(max_num_tokens: int, max_num_seqs: int) -> list[Shape]:
    """The shapes of steps that are recorded, small ones first."""
    rows = -(-max_num_seqs // 16) * 16
    sizes = [n for n in (1, 2, 3, 4, 8, *range(16, rows + 1, 16)) if n <= rows]
    prefills = [n for n in PREFILL_SIZES if n <= max_num_tokens]
    return [Shape(n, n) for n in sizes] + [Shape(n, MAX_PREFILL_SEQS) for n in prefills]


Ran = tuple[torch.Tensor, Inputs]  # hidden states, [num_seqs, hidden_size], and a step's inputs


@dataclass(slots=True)
class Graph:
    """A step of some shape, recorded."""

    graph: torch.cuda.CUDAGraph
    ran: Ran  # the same memory at each replay


def capture(run: Callable[[], Ran], pool: Any) -> Graph:
    """Record what a step launches; other threads may go on using the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        ran = run()
    return Graph(graph, ran)


class Graphs:
    """The recorded steps, by shape, small ones first. All share one pool of memory."""

    def __init__(self, blank_step: Callable[[Shape], Step], execute: Callable[[Step], Ran]):
        self.blank_step, self.execute = blank_step, execute
        self.recorded: dict[Shape, Graph] = {}

    def run(self, step: Step) -> Ran:
        """Run a step whose inputs are on the device: replayed, or kernel by kernel."""
        recorded = self.recorded.get(step.shape)
        if recorded is None:
            return self.execute(step)
        recorded.graph.replay()
        return recorded.ran

    def capture_all(self, shapes: list[Shape], pool: Any) -> None:
        """Record a step of each shape, the largest first: the others find room in what it took."""
        graphs = {shape: self.record(shape, pool) for shape in reversed(shapes)}
        self.recorded = {shape: graphs[shape] for shape in shapes}

    @torch.inference_mode()
    def record(self, shape: Shape, pool: Any) -> Graph:
        """A step of this shape, all of it padding, run once and then recorded."""
        run = partial(self.execute, self.blank_step(shape))
        run()
        return capture(run, pool)

    def estimate_bytes(self, shapes: list[Shape], device: torch.device) -> int:
        """About how much memory recording these shapes will take, from three of them."""
        if not shapes:
            return 0
        reserved, trial, pool = [reserved_memory(device)], [], torch.cuda.graph_pool_handle()
        for shape in (shapes[-1], max(s for s in shapes if s.is_decode), shapes[0]):
            trial.append(self.record(shape, pool))
            reserved.append(reserved_memory(device))
        each = reserved[3] - reserved[2]
        return reserved[2] - reserved[0] + each * (len(shapes) - 2)

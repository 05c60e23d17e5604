"""Steps that are recorded once, and replayed with one call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.engine.memory import reserved_memory
from nanovllm.engine.step_inputs import Inputs, Shape

MAX_PREFILL_SEQS = 8  # in a step with a prompt that is recorded
PREFILL_SIZES = (64, 128, 256, 512, 1024, 2048)  # its tokens


def graph_shapes(max_num_tokens: int, max_num_seqs: int) -> list[Shape]:
    """The shapes of steps that are recorded, small ones first."""
    rows = -(-max_num_seqs // 16) * 16
    sizes = [n for n in (1, 2, 3, 4, 8, *range(16, rows + 1, 16)) if n <= rows]
    prefills = [n for n in PREFILL_SIZES if n <= max_num_tokens]
    return [Shape(n, n) for n in sizes] + [Shape(n, MAX_PREFILL_SEQS) for n in prefills]


def capture(
    step: Callable[[], torch.Tensor], pool: Any
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Record what a step launches; returns the graph and what the step returned.

    Other threads may go on using the GPU meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden = step()
    return graph, hidden


@dataclass(slots=True)
class Graph:
    """A step of some shape, recorded."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    hidden: torch.Tensor  # [num_seqs, hidden_size]: what a replay makes its logits of


BlankStep = Callable[[Shape], tuple[Inputs, Callable[[], torch.Tensor]]]


class Graphs:
    """The recorded steps, by shape, small ones first. All share one pool of memory."""

    def __init__(self, blank_step: BlankStep):
        self.blank_step = blank_step
        self.recorded: dict[Shape, Graph] = {}

    def shape_for(self, step: Shape) -> Shape:
        """The smallest recorded shape that holds this step, else the step's own."""
        return next((shape for shape in self.recorded if step.fits(shape)), step)

    def inputs(self, shape: Shape) -> Inputs | None:
        """Where a replay finds its inputs; None where nothing is recorded."""
        graph = self.recorded.get(shape)
        return graph.inputs if graph else None

    def replay(self, shape: Shape) -> torch.Tensor | None:
        """Run the recorded step and return its hidden states; None where nothing is recorded."""
        graph = self.recorded.get(shape)
        if graph is None:
            return None
        graph.graph.replay()
        return graph.hidden

    def capture_all(self, shapes: list[Shape], pool: Any) -> None:
        """Record a step of each shape, the largest first: the others find room in what it took."""
        graphs = {shape: self.record(shape, pool) for shape in reversed(shapes)}
        self.recorded = {shape: graphs[shape] for shape in shapes}

    @torch.inference_mode()
    def record(self, shape: Shape, pool: Any) -> Graph:
        """A step of this shape, all of it padding, run once and then recorded."""
        inputs, step = self.blank_step(shape)
        step()
        graph, hidden = capture(step, pool)
        return Graph(graph, inputs, hidden)

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

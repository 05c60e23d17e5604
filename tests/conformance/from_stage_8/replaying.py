"""Recorded steps without a GPU: the graph path of the engine, with a stand-in for the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nanovllm import LLM
from nanovllm.engine import graphs


class Replayed:
    """In the place of a CUDA graph: a replay runs the step again, on what its inputs hold then."""

    def __init__(self, run: Callable[[], graphs.Ran]):
        self.run, self.ran, self.num_replays = run, run(), 0

    def replay(self) -> None:
        self.num_replays += 1
        self.ran[0].copy_(self.run()[0])


def capture(run: Callable[[], graphs.Ran], pool: None) -> graphs.Graph:
    """In the place of `graphs.capture`."""
    graph = Replayed(run)
    return graphs.Graph(graph, graph.ran)


def record(llm: LLM, sizes: tuple[int, ...], most: int = 512) -> None:
    """Record the shapes that a GPU would have recorded, of at most so many sequences.

    `sizes` are those of steps with prompts, in tokens.
    """
    runner = llm.model_runner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capture", capture)
        patch.setattr(graphs, "PREFILL_SIZES", sizes)
        shapes = runner.graph_shapes(llm.config)
        runner.capture_cudagraph([shape for shape in shapes if shape.num_seqs <= most])


def replays(llm: LLM) -> dict[tuple[int, int], int]:
    """How often each shape has been replayed since the last call; without those that were not."""
    counts = {}
    for shape, recorded in llm.model_runner.graphs.recorded.items():
        if recorded.graph.num_replays:
            counts[tuple(shape)] = recorded.graph.num_replays
            recorded.graph.num_replays = 0
    return counts

"""Recorded steps without a GPU: the graph path of the engine, with a stand-in for the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine import graphs


class Replayed:
    """In the place of a CUDA graph: a replay runs the step again, on what its inputs hold then."""

    def __init__(self, step: Callable[[], torch.Tensor]):
        self.step, self.hidden, self.num_replays = step, step(), 0

    def replay(self) -> None:
        self.num_replays += 1
        self.hidden.copy_(self.step())


def capture(step: Callable[[], torch.Tensor], pool: None) -> tuple[Replayed, torch.Tensor]:
    """In the place of `graphs.capture`."""
    graph = Replayed(step)
    return graph, graph.hidden


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

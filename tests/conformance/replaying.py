"""Recorded steps without a GPU: the graph path of the engine, with a stand-in for the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.engine import graphs


class Replayed:
    """In the place of a CUDA graph: a replay runs the step again, on what its inputs hold then."""

    def __init__(self, run: Callable[[], Any]):
        self.run, self.returned, self.num_replays = run, run(), 0

    def replay(self) -> None:
        self.num_replays += 1
        for tensor, again in zip(self.returned or (), self.run() or (), strict=True):
            if tensor is not None:
                tensor.copy_(again)


def capture(run: Callable[[], Any], pool: None) -> tuple[Replayed, Any]:
    """In the place of `graphs.capture`."""
    graph = Replayed(run)
    return graph, graph.returned


def record(llm: LLM, sizes: tuple[int, ...], most: int = 512, mixed: tuple[int, ...] = ()) -> None:
    """Record the shapes that a GPU would have recorded, of at most so many sequences.

    `sizes` are those of steps with prompts, in tokens; `mixed` those of prompts beside decodes.
    """
    runner = llm.model_runner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capture", capture)
        patch.setattr(graphs, "PROMPT_SIZES", sizes)
        patch.setattr(graphs, "MIXED_SIZES", mixed)
        shapes = runner.graph_shapes(llm.config)
        runner.capture_cudagraph([shape for shape in shapes if shape.num_seqs <= most])


def replays(llm: LLM) -> dict[tuple[int, int, int], int]:
    """How often each shape has been replayed since the last call; without those that were not."""
    counts = {}
    for shape, recorded in llm.model_runner.graphs.recorded.items():
        if recorded.step.num_replays:
            counts[tuple(shape)] = recorded.step.num_replays
            recorded.step.num_replays = 0
    return counts

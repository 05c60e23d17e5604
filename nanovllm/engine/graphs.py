"""Steps that are recorded once, and replayed with one call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from nanovllm.engine.memory import reserved_memory
from nanovllm.engine.step_inputs import Shape, Step

MAX_PROMPTS = 8  # in a step that is recorded
PROMPT_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)  # their tokens, without decodes
MIXED_SIZES = (128, 512, 1024, 2048, 4096, 8192)  # beside decodes
MIXED_DECODES = (32, 128)  # and as many as there may be


def graph_shapes(max_num_tokens: int, max_num_seqs: int) -> list[Shape]:
    """The shapes of steps that are recorded, small ones first."""
    most = -(-max_num_seqs // 16) * 16
    sizes = 1, 2, 3, 4, 8, *range(16, min(most, 256) + 1, 16), *range(288, most + 16, 32)
    shapes = [Shape(n, n, n) for n in sizes if n <= most]
    if most not in sizes:
        shapes.append(Shape(most, most, most))
    shapes += [Shape(n, MAX_PROMPTS, 0) for n in PROMPT_SIZES if n <= max_num_tokens]
    for rows in (*(n for n in MIXED_DECODES if n < most), most):
        mixed = [n for n in MIXED_SIZES if n <= max_num_tokens]
        shapes += [Shape(rows + n, rows + MAX_PROMPTS, rows) for n in mixed]
    return sorted(shapes)


def largest_shape(shapes: list[Shape], max_num_tokens: int) -> Shape:
    """As large as any of these, and as a step of so many tokens."""
    rows = max(shape.num_seqs for shape in shapes)
    return Shape(max(max_num_tokens, *(shape.num_tokens for shape in shapes)), rows, rows)


class Ran(NamedTuple):
    """What a step leaves on the device, beside the sampled tokens."""

    hidden: torch.Tensor  # each sequence's last hidden state, [num_seqs, hidden_size]
    logits: torch.Tensor | None = None  # theirs, where they are at hand
    tokens: torch.Tensor | None = None  # each token's hidden state, where prompts are scored


@dataclass(slots=True)
class Graph:
    """A step of some shape, recorded."""

    step: torch.cuda.CUDAGraph  # the model, and sampling without filters
    again: torch.cuda.CUDAGraph | None  # sampling once more, for the rows that ask for more
    hidden: torch.Tensor  # the hidden states, in the same memory at each replay


def capture(run: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record what a function launches; other threads may go on using the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        returned = run()
    return graph, returned


class Graphs:
    """The recorded steps, by shape, small ones first. All share one pool of memory."""

    def __init__(
        self,
        blank_step: Callable[[Shape], Step],
        execute: Callable[[Step], Ran],
        resample: Callable[[Step, Ran], None],
        records_resample: bool,
    ):
        self.blank_step, self.execute, self.resample = blank_step, execute, resample
        self.records_resample = records_resample
        self.recorded: dict[Shape, Graph] = {}

    def run(self, step: Step) -> Ran:
        """Run a step whose inputs are on the device: replayed, or kernel by kernel."""
        recorded = self.recorded_for(step)
        if recorded is None:
            ran = self.execute(step)
        else:
            recorded.step.replay()
            ran = Ran(recorded.hidden)
        again = None if recorded is None else recorded.again
        if step.asked.edits is None and again is not None:
            if step.asked.more:
                again.replay()
        elif step.asked.more or step.asked.edits is not None:
            self.resample(step, ran)
        return ran

    def recorded_for(self, step: Step) -> Graph | None:
        """The graph that a step can be replayed by: none for one that scores prompts."""
        return None if step.asked.reads_prompts else self.recorded.get(step.shape)

    def capture_all(self, shapes: list[Shape], on_gpu: bool) -> None:
        """Record a step of each shape, the largest first: the others find room in what it took."""
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        graphs = {shape: self.record(shape, pool) for shape in reversed(shapes)}
        self.recorded = {shape: graphs[shape] for shape in shapes}

    @torch.inference_mode()
    def record(self, shape: Shape, pool: Any) -> Graph:
        """A step of this shape, all of it padding, run once and then recorded."""
        step, again = self.blank_step(shape), None
        self.resample(step, self.execute(step))
        graph, ran = capture(partial(self.execute, step), pool)
        if self.records_resample:
            again = capture(partial(self.resample, step, ran), pool)[0]
        return Graph(graph, again, ran.hidden)

    def estimate_bytes(self, shapes: list[Shape], device: torch.device) -> int:
        """About how much memory recording these shapes will take, from three of them."""
        if not shapes:
            return 0
        reserved, trial, pool = [reserved_memory(device)], [], torch.cuda.graph_pool_handle()
        for shape in (shapes[-1], max(shapes, key=lambda shape: shape.num_seqs), shapes[0]):
            trial.append(self.record(shape, pool))
            reserved.append(reserved_memory(device))
        each = reserved[3] - reserved[2]
        return reserved[2] - reserved[0] + each * (len(shapes) - 2)

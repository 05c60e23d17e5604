"""The exercises of chapters 8 and 9, as checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checks import Wrong, exercise, near, tokens_of

# ---- Chapter 8 ----


@exercise
def frozen(step: Callable[[Any, Any, Any], Any]) -> None:
    """`step(x, y, factor)` writes y; it is recorded once, and replayed with other numbers."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Noted(TorchDispatchMode):
        """The operations that a step calls, and what they wrote."""

        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = operation(*args, **(kwargs or {}))
            calls.append((operation, args, kwargs or {}, out))
            return out

    for recorded_with in (2.0, -2.0):
        calls: list[tuple] = []
        x, y, factor = torch.ones(6), torch.zeros(6), torch.tensor(recorded_with)
        try:
            with Noted():
                step(x, y, factor)
        except Exception as error:
            raise Wrong(f"it makes no step that can be recorded: {error!r}") from error
        for number in (3.0, -1.0, 0.0, 10.0):
            x.copy_(torch.arange(6.0) - 2)
            factor.fill_(number)
            y.fill_(7)
            for operation, args, kwargs, out in calls:
                new = operation(*args, **kwargs)
                if isinstance(out, torch.Tensor) and new is not out:
                    out.copy_(new)
            right = x * number if number > 0 else torch.zeros(6)
            if not torch.equal(y, right):
                what = f"recorded with {recorded_with:g} and replayed with {number:g}: y is not"
                raise Wrong(f"{what} {y.tolist()} but {right.tolist()}")


@exercise
def sizes(padded_now: float, padded: float, graphs: float) -> None:
    """Rows of a decode step at batch 130, and graphs of decode steps."""
    near("padded_now", padded_now, 144, "up to 256 the sizes are multiples of 16", 0)
    near("padded", padded, 256, "it takes the smallest power of two that holds it", 0)
    near("graphs", graphs, 10, "from 1 up to 512, each twice the one before", 0)


@exercise
def powers_of_two() -> None:
    """An engine that records decode steps of powers of two, and the others as before."""
    from nanovllm.engine.graphs import graph_shapes
    from nanovllm.engine.step_inputs import Shape

    for most in (1, 20, 64, 130, 512):
        shapes = graph_shapes(1024, most)
        rows = [s.num_seqs for s in shapes if s.num_decodes == s.num_seqs]
        powers = [1 << i for i in range(len(rows))]
        if rows != powers or rows[-1] < most:
            raise Wrong(f"for {most} sequences these batch sizes are recorded: {rows}")
        if shapes != sorted(shapes):
            raise Wrong("the shapes are not in order, and Packer takes the first that fits")
        mixed = Shape(most + 700, most + 8, most)
        for step in (Shape(1000, 8, 0), *([mixed] if most + 700 <= 1024 else [])):
            if not any(step.fits(shape) for shape in shapes):
                raise Wrong(f"no shape is recorded any more for {step}")


# ---- Chapter 9 ----


@exercise
def known_lengths(wasted: float, wasted_with_stop: float, wasted_at_fifth: float) -> None:
    """Rows that nobody wants, of a request for eight tokens, as the engine shows them."""
    from nanovllm import LLM

    llm, prompt, tokens = LLM(device="cpu", async_scheduling=True), [4, 9], [0]
    try:
        while len(set(tokens)) < 8:  # a prompt whose answer has no token twice
            prompt = [prompt[0] + 1, 9]
            tokens = tokens_of(llm, [prompt], max_tokens=8)[0]
        none = rows_run(llm, [prompt], max_tokens=8) - 8
        at_last = rows_run(llm, [prompt], max_tokens=8, stop_token_ids=tokens[7:]) - 8
        at_fifth = rows_run(llm, [prompt], max_tokens=8, stop_token_ids=tokens[4:5]) - 5
    finally:
        llm.exit()
    near("wasted", wasted, none, "the length is known before the token is", 0)
    hint = "the eighth token is the last in any case"
    near("wasted_with_stop", wasted_with_stop, at_last, hint, 0)
    hint = "one step was launched before the fifth token was read"
    near("wasted_at_fifth", wasted_at_fifth, at_fifth, hint, 0)


def rows_run(llm: Any, prompts: list[list[int]], **params: Any) -> int:
    """How many rows the steps have in which an engine answers these prompts."""
    counts, push = [], llm.pipeline.push

    def noted(seqs: list[Any], *args: Any) -> None:
        counts.append(len(seqs))
        push(seqs, *args)

    llm.pipeline.push = noted
    try:
        tokens_of(llm, prompts, **params)
    finally:
        llm.pipeline.push = push
    return sum(counts)


@exercise
def dropped() -> None:
    """An engine that counts the rows whose token nobody wanted."""
    from nanovllm import LLM, SamplingParams

    options: dict[str, Any] = dict(kvcache_block_size=16, enable_prefix_caching=False)
    llm = LLM(device="cpu", async_scheduling=True, max_num_batched_tokens=16, **options)
    try:
        if not hasattr(llm.pipeline, "num_dropped"):
            raise Wrong("the engine's pipeline has no num_dropped")
        prompts = [[7] * 40, [8, 9], [20]]
        firsts = [tokens_of(llm, [prompt], max_tokens=1)[0][0] for prompt in prompts]
        cases: list[tuple[str, list, dict, int]] = [
            ("of known length, the longest prompt in chunks,", prompts, {}, 0),
            ("one ends by surprise", prompts[:1], dict(stop_token_ids=firsts[:1]), 1),
            ("all end by surprise", prompts[1:], dict(stop_token_ids=firsts[1:]), 2),
        ]
        for what, asked, params, right in cases:
            before = llm.pipeline.num_dropped
            tokens_of(llm, asked, max_tokens=8, **params)
            if (found := llm.pipeline.num_dropped - before) != right:
                raise Wrong(f"{len(asked)} requests, {what}: {found} rows counted, and {right} are")
        before = llm.pipeline.num_dropped
        chunked = llm.add_request(prompts[0], SamplingParams(max_tokens=8))
        llm.step()
        llm.abort(chunked)
        if llm.pipeline.num_dropped != before:
            raise Wrong("a request that is aborted between two chunks counts, and has no such row")
    finally:
        llm.exit()


@exercise
def depth_three() -> None:
    """An engine with three steps in flight, whose tokens are right when memory is short too."""
    from random import Random

    from nanovllm import LLM

    dice, options = Random(1), dict[str, Any](kvcache_block_size=4, enable_prefix_caching=False)
    batches = [([2, 7, 4, 1, 7], [3, 2, 6, 5, 4])]  # lengths of prompts, and of answers
    for _ in range(12):
        pairs = [(dice.randint(1, 7), dice.randint(2, 5)) for _ in range(6)]
        batches.append(([a for a, _ in pairs], [b for _, b in pairs]))
    small = LLM(device="cpu", num_kvcache_blocks=3, **options)
    large = LLM(device="cpu", num_kvcache_blocks=64, **options)
    try:
        if small.config.max_in_flight != 3:
            raise Wrong(f"max_in_flight is {small.config.max_in_flight}, not 3")
        for lengths, outputs in batches:
            prompts = [[20 + 7 * i + j for j in range(n)] for i, n in enumerate(lengths)]
            if answers(small, prompts, outputs) != answers(large, prompts, outputs):
                what = f"prompts of {lengths} tokens with max_tokens of {outputs}"
                raise Wrong(f"{what} in 3 blocks: a token is not the one that many blocks give")
    finally:
        small.exit()
        large.exit()


def answers(llm: Any, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """The greedy tokens of each prompt, so many of each, all asked for at once."""
    from nanovllm import SamplingParams

    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in lengths]
    return [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]

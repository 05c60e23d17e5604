"""The exercises of chapters 10 and 11, as checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, BrokenBarrierError
from typing import Any

from checks import Wrong, exercise, made_by, near, tokens_of

# ---- Chapter 10 ----


@exercise
def wrong_cut(exchanges: float, kilobytes: float) -> None:
    """Of an MLP of Qwen3-8B, for one token."""
    near("exchanges", exchanges, 2, "one before the activation, one behind the second product", 0)
    near("kilobytes", kilobytes, 56, "24,576 numbers of two bytes, then 4,096", 0.05)


@cache
def exchanges_of(LLM: Any) -> list[int]:
    """What rank 0 counts for three calls of an engine of this class; it starts a process."""
    sizes = {"max_num_batched_tokens": 40, "num_kvcache_blocks": 32, "kvcache_block_size": 16}
    llm = LLM(device="cpu", tensor_parallel_size=2, enable_prefix_caching=False, **sizes)
    came, told = llm.model_runner.group.came, []
    try:
        for prompts in ([[9] * 10], [[9 + i] * 10 for i in range(4)], [[9] * 100]):
            before = int(came[0])
            tokens_of(llm, prompts, max_tokens=1)
            told.append(int(came[0]) - before)
    finally:
        llm.exit()
    return told


@exercise
def exchanges(one: float, four: float, chunked: float) -> None:
    """That rank 0 comes to: for a prompt in a step, for four in a step, for one in three steps."""
    from nanovllm import LLM

    told = exchanges_of(LLM)
    near("one", one, told[0], "two in each of five layers, one for the embedding, one to sample", 0)
    near("four", four, told[1], "all tokens of a step share its exchanges", 0)
    near("chunked", chunked, told[2], "100 tokens take three steps of at most 40", 0)


@exercise
def own_heads(rule: Callable[[int, int, int], list[int]]) -> None:
    """`rule(num_kv_heads, ranks, rank)` -> which key heads the rank holds."""
    for heads, ranks in ((8, 2), (4, 4), (9, 3), (5, 1), (4, 8), (2, 8), (1, 3)):
        for rank in range(ranks):
            own = max(1, heads // ranks)
            first = rank * heads // ranks
            found, right = made_by(rule, heads, ranks, rank), list(range(first, first + own))
            if not isinstance(found, list | range) or list(found) != right:
                raise Wrong(f"{found!r} is not what rank {rank} of {ranks} has of {heads} heads")


@exercise
def pays_off(small: float, large: float) -> None:
    """Microseconds that a sum may take at most: with Qwen3-0.6B, and with Qwen3-32B."""
    hint = "half of the time for the weights, by two sums a layer and one for the embedding"
    near("small", small, 1.19e9 / 4.1e12 / 2 / 57 * 1e6, hint, 0.05)
    near("large", large, 63.97e9 / 4.1e12 / 2 / 129 * 1e6, hint, 0.05)


class Meeting:
    """A link for ranks that are threads of one process: it adds up what they bring."""

    def __init__(self, ranks: int):
        self.parts: list[Any] = []
        self.barrier = Barrier(ranks, timeout=10)

    def all_reduce(self, x: Any, patience: Any) -> None:
        """The sum over all ranks, in the place of x."""
        self.parts.append(x.clone())
        self.barrier.wait()
        total = sum(self.parts)
        if self.barrier.wait() == 0:
            self.parts.clear()
        self.barrier.wait()
        x.copy_(total)


@exercise
def broadcast() -> None:
    """A group whose ranks can all have what one of them has."""
    import torch

    from nanovllm.parallel.group import Group

    if not hasattr(Group, "broadcast"):
        raise Wrong("Group has no broadcast")
    kind: Any = Group
    for ranks, source in ((1, 0), (2, 0), (2, 1), (3, 1)):
        own, meeting = [torch.full((2, 3), math.nan) for _ in range(ranks)], Meeting(ranks)
        own[source] = torch.arange(6.0).view(2, 3)
        groups = [kind(rank, ranks, link=meeting) for rank in range(ranks)]
        with ThreadPoolExecutor(ranks) as pool:
            jobs = [pool.submit(g.broadcast, own[g.rank].clone(), source) for g in groups]
        try:
            found = [job.result() for job in jobs]
        except BrokenBarrierError as error:
            raise Wrong("not all ranks came to the exchange") from error
        for rank, x in enumerate(found):
            if not torch.equal(x, own[source]):
                raise Wrong(f"of {ranks} ranks, rank {source} tells 0 to 5: {rank} has {x}")


# ---- Chapter 11 ----


@exercise
def penalised(rule: Callable[..., list[float]]) -> None:
    """`rule(logits, prompt, completion, repetition, presence, frequency)` -> the new logits."""
    logits = [2.0, -2.0, 0.5, 0.0, -1.0, 4.0]
    for prompt, said, *costs in (
        ([0, 1, 1], [2, 2, 4], 2.0, 0.5, 0.25),
        ([5], [5, 5, 1], 1.5, 0.0, 1.0),
        ([0, 3], [], 1.25, 2.0, 2.0),
        ([2], [0, 1], 0.5, -1.0, 0.0),
        ([0], [1], 1.0, 0.0, 0.0),
    ):
        r, p, f = costs
        right = [
            (x / r if x > 0 else x * r) if i in {*prompt, *said} else x
            for i, x in enumerate(logits)
        ]
        right = [x - f * said.count(i) - p * (i in said) for i, x in enumerate(right)]
        found = made_by(rule, list(logits), list(prompt), list(said), *costs)
        if not isinstance(found, list) or len(found) != len(logits):
            raise Wrong(f"{found!r} is not a list of {len(logits)} logits")
        for i, (x, y) in enumerate(zip(found, right)):
            if not math.isclose(x, y, abs_tol=1e-6):
                asked = f"prompt {prompt}, completion {said}, penalties {costs}"
                raise Wrong(f"{asked}: the logit of token {i}, {logits[i]}, is not {x} but {y}")


@exercise
def scores(first: float, third: float, fourth: float) -> None:
    """Log-probabilities that three of a request's four steps tell."""
    from nanovllm import LLM

    llm, told = LLM(device="cpu", max_num_batched_tokens=4), []
    runner: Any = llm.model_runner
    launch = runner.launch

    def noted(step: Any) -> Any:
        told.append(len(step.asked.scores))
        return launch(step)

    runner.launch = noted
    try:
        tokens_of(llm, [list(range(10, 20))], max_tokens=2, prompt_logprobs=0, logprobs=0)
    finally:
        llm.exit()
    near("first", first, told[0], "positions 0 to 3 predict tokens 1 to 4", 0)
    near(
        "third", third, told[2], "positions 8 and 9 predict the last of the prompt, and one more", 0
    )
    near("fourth", fourth, told[3], "its only token predicts one", 0)


@exercise
def sigma() -> None:
    """An engine that keeps the tokens within some standard deviations of the likeliest."""
    from nanovllm import LLM, SamplingParams

    if not hasattr(SamplingParams(), "sigmas"):
        raise Wrong("SamplingParams has no sigmas")
    llm, free = LLM(device="cpu"), dict(temperature=2.0, seed=3, max_tokens=24)
    model: Any = llm.model_runner.model
    logits_of, rows, prompts = model.compute_logits, [], [[7, 8, 9]]

    def noted(hidden: Any) -> Any:
        rows.append((logits := logits_of(hidden))[0].float().clone())
        return logits

    try:
        plain = tokens_of(llm, prompts, **free)
        if tokens_of(llm, prompts, **free, sigmas=0.0) != plain:
            raise Wrong("with sigmas=0 nothing is dropped")
        if tokens_of(llm, prompts, **free, sigmas=1000.0) != plain:
            raise Wrong("with sigmas=1000 nothing is that far below the likeliest")
        greedy = tokens_of(llm, prompts, max_tokens=24)
        if tokens_of(llm, prompts, **free, sigmas=1e-6) != greedy:
            raise Wrong("with sigmas=0.000001 the likeliest token alone is left, so it is greedy")
        model.compute_logits = noted
        (found,) = tokens_of(llm, prompts, **free, sigmas=1.5)
    finally:
        llm.exit()
    for row, token_id in zip(rows, found):
        if row[token_id] < row.max() - 1.51 * row.std():
            raise Wrong("with sigmas=1.5 a token is drawn whose logit is further below the largest")
    if found in (greedy[0], plain[0]):
        raise Wrong("with sigmas=1.5 some tokens are dropped, and more than one is left")

"""What the exercises ask for, as checks: `tangle.verify(name, ...)` runs one in a notebook.

An exercise asks for numbers, for a function, or for another engine: then its check tries the
package as the executed cells have it. A check raises Wrong, which says what is not right yet.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any


class Wrong(Exception):
    """An answer, or an engine, that is not yet what the exercise asks for."""


CHECKS: dict[str, Callable[..., None]] = {}


def exercise(check: Callable[..., None]) -> Callable[..., None]:
    """A check under its exercise's name: that of the label, without `ex-`."""
    CHECKS[check.__name__.replace("_", "-")] = check
    return check


def verify(name: str, **answers: Any) -> str:
    """Check an exercise; returns what to say. Wrong where it is not right, or not asked so."""
    if name not in CHECKS:
        raise Wrong(f"there is no exercise {name!r} that checks itself: {', '.join(CHECKS)}")
    wanted = list(inspect.signature(CHECKS[name]).parameters)
    if sorted(wanted) != sorted(answers):
        asked = (
            ", ".join(f"{answer}=..." for answer in wanted) or "no answers, but a changed engine"
        )
        raise Wrong(f"{name!r} asks for {asked}")
    CHECKS[name](**answers)
    return "right"


def near(name: str, given: float, right: float, hint: str, within: float = 0.02) -> None:
    """Wrong unless a number is right, or as near as its rounding may bring it."""
    if not isinstance(given, Real) or not math.isclose(given, right, rel_tol=within):
        raise Wrong(f"{name} is not {given}: {hint}")


def tokens_of(llm: Any, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """The token ids that an engine answers each prompt with."""
    from nanovllm import SamplingParams

    asked = SamplingParams(**{"temperature": 0, "ignore_eos": True, **params})
    return [out["token_ids"] for out in llm.generate(prompts, asked, use_tqdm=False)]


def order_of_ends(requests: list[tuple[int, int]], max_num_seqs: int) -> list[int]:
    """In which order requests of (prompt tokens, output tokens) end that come at once."""
    from nanovllm import LLM, SamplingParams

    llm, ids, ended = LLM(device="cpu", max_num_seqs=max_num_seqs), [], []
    try:
        for length, output in requests:
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output)
            ids.append(llm.add_request([5 + length] * length, params))
        for seqs in steps(llm):
            ended += [ids.index(seq.seq_id) for seq in seqs if seq.is_finished]
    finally:
        llm.exit()
    return ended


def steps(llm: Any, most: int = 500) -> Iterator[list[Any]]:
    """What each step of an engine returns, until it has no request; Wrong where it never ends."""
    for _ in range(most):
        if llm.is_finished():
            return
        yield llm.step()
    raise Wrong(f"after {most} steps there are requests left that get no token")


# ---- Chapter 1 ----


@exercise
def naive_cost(naive: float, ideal: float, tenfold: float) -> None:
    """Tokens that the loops run, and the first output length at which one runs ten times more."""
    near("naive", naive, 14_950, "the first step runs 100 tokens, the next one 101, and so on", 0)
    near("ideal", ideal, 199, "each token is run once, and the last one is never run", 0)
    near("tenfold", tenfold, 11, "n outputs cost n (100 + (n - 1) / 2) against 99 + n", 0)


@exercise
def epsilon() -> None:
    """An engine that drops unlikely tokens."""
    from nanovllm import LLM, SamplingParams

    if not hasattr(SamplingParams(), "epsilon"):
        raise Wrong("SamplingParams has no epsilon")
    llm, prompts = LLM(device="cpu"), [[7, 8, 9], [20]]
    try:
        greedy, free = tokens_of(llm, prompts), dict(temperature=1.5, seed=3)
        if tokens_of(llm, prompts, epsilon=1.0, **free) != greedy:
            raise Wrong("with epsilon=1 the likeliest token alone is left, so it is greedy")
        if tokens_of(llm, prompts, epsilon=0.0, **free) != tokens_of(llm, prompts, **free):
            raise Wrong("with epsilon=0 nothing is dropped")
        if tokens_of(llm, prompts, epsilon=0.3, **free) == tokens_of(llm, prompts, **free):
            raise Wrong("with epsilon=0.3 at a high temperature something has to be dropped")
    finally:
        llm.exit()


@exercise
def batch_naive() -> None:
    """An engine that runs up to four sequences in a step."""
    from nanovllm import LLM, SamplingParams

    llm, prompts = LLM(device="cpu"), [[5, 6, 7], [8], [9, 9], [10, 11], [12]]
    try:
        alone = [tokens_of(llm, [prompt], max_tokens=4)[0] for prompt in prompts]
        for prompt in prompts:
            llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        sizes = [len(seqs) for seqs in steps(llm)]
        if sizes[0] != 4:
            raise Wrong(f"of five requests the first step runs {sizes[0]}, not four")
        if tokens_of(llm, prompts, max_tokens=4) != alone:
            raise Wrong("the tokens differ from those of each request alone")
    finally:
        llm.exit()


# ---- Chapter 2 ----


@exercise
def kv_budget(tokens: float, sequences: float, unwasted: float) -> None:
    """What fits into the memory that the weights of Qwen3-8B leave of 80 GB."""
    near("tokens", tokens, 63.6e9 / 147_456, "a token's keys and values take 147,456 bytes")
    near("sequences", sequences, 105, "each takes a row of 4,096 tokens")
    near("unwasted", unwasted, 616, "each takes 700 tokens")


@exercise
def intensity(tokens: float) -> None:
    """B * n at which the cache takes as long as the weights."""
    hint = "of the weights a step reads all but the embedding table, 15.1 GB"
    near("tokens", tokens, 103_000, hint)


@exercise
def sort_batch() -> None:
    """An engine whose batches are alike in length."""
    ended = order_of_ends([(2, 9), (2, 3), (2, 9), (2, 3)], max_num_seqs=2)
    if ended[:2] != [1, 3]:
        raise Wrong(f"of four requests, two at a time, these ended first: {ended[:2]}, not [1, 3]")


# ---- Chapter 3 ----


@exercise
def block_size(with_16: float, with_256: float, bytes_16: float, bytes_256: float) -> None:
    """Sequences that are alive, and bytes of their tables."""
    hint = "40 GB are 348,800 slots, and a sequence holds its 700 and half a block"
    near("with_16", with_16, 493, hint)
    near("with_256", with_256, 421, hint)
    near("bytes_16", bytes_16, 493 * 44.25 * 4, "some 44 blocks a sequence, 4 bytes each")
    near("bytes_256", bytes_256, 421 * 3.1 * 4, "some three blocks a sequence, 4 bytes each", 0.08)


@exercise
def free_list() -> None:
    """A manager that hands out the block that was freed last."""
    from nanovllm import SamplingParams
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.sequence import Sequence

    manager = BlockManager(8, 4)
    first, second, third = (Sequence(i, [1] * 6, SamplingParams(), seed=0) for i in range(3))
    manager.allocate(first)
    manager.allocate(second)
    freed = list(first.block_table)
    manager.deallocate(first)
    manager.allocate(third)
    manager.check_integrity([second, third])
    if sorted(third.block_table) != sorted(freed):
        raise Wrong(f"{freed} were freed last, and {third.block_table} are handed out")
    third.token_ids += [1, 1, 1]
    freed = list(second.block_table)
    manager.deallocate(second)
    manager.may_append(third)
    if third.block_table[-1] not in freed:
        raise Wrong(f"{freed} were freed last, and a text grows into {third.block_table[-1]}")


# ---- Chapter 4 ----


@exercise
def common_prompt(share_16: float, share_256: float) -> None:
    """Shares of the prompt tokens that are found, from 0 to 1."""
    near("share_16", share_16, 0.72, "18 whole blocks of 16 fit into 300 tokens")
    near("share_256", share_256, 0.64, "one whole block of 256 fits into 300 tokens")


@exercise
def release_order(found: float) -> None:
    """Blocks that the second request for the first text finds."""
    near("found", found, 0, "the first block of the text is the first to be overwritten", 0)


# ---- Chapter 5 ----


@exercise
def oldest_first(ends_first: float) -> None:
    """Of request 0, which came first, and request 1."""
    hint = "where request 1 needs a block, request 0 gives all of its own"
    near("ends_first", ends_first, 1, hint, 0)


@exercise
def shortest_first() -> None:
    """An engine that admits the shortest prompt that waits."""
    ended = order_of_ends([(9, 2), (30, 2), (4, 2), (12, 2)], max_num_seqs=1)
    if ended not in ([2, 0, 3, 1], [0, 2, 3, 1]):  # or the first had begun
        raise Wrong(f"prompts of 9, 30, 4 and 12 tokens ended in this order: {ended}")


# ---- Chapters 6 to 14 ----


@exercise
def join(rule: Callable[[tuple, tuple], tuple]) -> None:
    """`rule((m1, l1, o1), (m2, l2, o2))` -> (m, l, o), the o not yet divided by l."""

    def part(scores: list[float], values: list[float]) -> tuple[float, float, float]:
        m = max(scores, default=-math.inf)
        weights = [math.exp(s - m) for s in scores]
        return m, sum(weights), sum(w * v for w, v in zip(weights, values))

    scores, values = [0.5, 3.0, -2.0, 40.0, 1.0], [1.0, -2.0, 0.25, 4.0, 8.0]
    for cut in range(len(scores) + 1):
        parts = part(scores[:cut], values[:cut]), part(scores[cut:], values[cut:])
        try:
            found = rule(*parts)
            assert len(found) == 3
        except Exception as error:
            raise Wrong(f"of {parts[0]} and {parts[1]} it makes no (m, l, o): {error!r}") from error
        for name, one, other in zip("mlo", found, part(scores, values), strict=True):
            if not math.isclose(one, other, rel_tol=1e-6):
                what = "an empty part and five tokens" if cut in (0, 5) else f"{cut} and {5 - cut}"
                raise Wrong(f"joining {what}: {name} is {one}, and of all tokens {other}")


@exercise
def fused_bytes(before: float, after: float) -> None:
    """Bytes of a token."""
    near("before", before, 128 * 256, "48 heads for the norms, 48 for the turns, 32 for the copies")
    near("after", after, 64 * 256, "32 heads are read, and as many written")


@exercise
def sizes(padded: float) -> None:
    """Rows of a decode step at batch 130."""
    near("padded", padded, 256, "it takes the smallest power of two that holds it", 0)


@exercise
def known_lengths(wasted: float, wasted_with_stop: float, wasted_at_fifth: float) -> None:
    """Rows that nobody wants."""
    hint = "the length is known before the token is"
    near("wasted", wasted, 0, hint, 0)
    near("wasted_with_stop", wasted_with_stop, 0, "the eighth token is the last in any case", 0)
    hint = "one step was launched before the fifth token was read"
    near("wasted_at_fifth", wasted_at_fifth, 1, hint, 0)


@exercise
def wrong_cut(exchanges: float, kilobytes: float) -> None:
    """Of an MLP of Qwen3-8B, for one token."""
    near("exchanges", exchanges, 2, "one before the activation, one behind the second product", 0)
    near("kilobytes", kilobytes, 56, "24,576 numbers of two bytes, then 4,096", 0.05)


@exercise
def batch(size: float) -> None:
    """The batch at which a token of Qwen3-30B-A3B costs half of what it costs alone."""
    near("size", size, 10, "compare weights_read(config, [B]) with B times weights_read of one", 0)

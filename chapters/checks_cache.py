"""The exercises of chapters 0 to 2, as checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checks import Wrong, counted, exercise, made_by, near, order_of_ends, steps, tokens_of

# ---- Chapter 0 ----


@exercise
def refused(count: float) -> None:
    """How many of the exercise's ten calls raise a ValueError."""
    import numpy as np

    from nanovllm.config import Config
    from nanovllm.sampling_params import SamplingParams

    calls: list[tuple[Callable[..., Any], str, Any]] = [
        (SamplingParams, "temperature", 1),
        (SamplingParams, "temperature", True),
        (SamplingParams, "top_p", 0),
        (SamplingParams, "top_p", 1),
        (SamplingParams, "top_k", 5.0),
        (SamplingParams, "max_tokens", None),
        (SamplingParams, "stop", ""),
        (SamplingParams, "stop_token_ids", [True]),
        (Config.from_options, "max_model_len", np.int64(100)),
        (Config.from_options, "max_modellen", 100),
    ]
    refusals = 0
    for make, name, value in calls:
        try:
            make(**{name: value})
        except ValueError:
            refusals += 1
    hint = "an int may stand for a float, but a float for no int and True for no number"
    near("count", count, refusals, hint, 0)


@exercise
def timeout() -> None:
    """An option of a request that is checked, and that the command line offers."""
    from nanovllm import SamplingParams
    from nanovllm.__main__ import make_parser, take

    if not hasattr(SamplingParams(), "timeout"):
        raise Wrong("SamplingParams has no timeout")
    given: Callable[..., Any] = SamplingParams  # with a field that this chapter's has not
    if given().timeout is not None or given(timeout=2).timeout != 2:
        raise Wrong("a timeout is a number of seconds, and None where nobody gives one")
    for misfit in (0, -1.5, float("nan"), "2", True):
        try:
            given(timeout=misfit)
        except ValueError:
            continue
        raise Wrong(f"timeout={misfit!r} is not refused")
    args = make_parser().parse_args(["generate", "Once", "--timeout", "2.5"])
    if take(args, SamplingParams).get("timeout") != 2.5:
        raise Wrong("the command line does not hand --timeout 2.5 on")


@exercise
def hold_back(safe: Callable[[str, str], str]) -> None:
    """`safe(text, stop)`: what may be shown of a text that grows, with one stop string."""
    for text, stop, right in [
        ("one day", "the end", "one day"), ("this is the e", "the end", "this is "),
        ("this is the end. No", "the end", "this is "), ("to", "the end", "to"),
        ("lot", "the end", "lo"), ("abab", "abac", "ab"), ("aab", "aac", "aab"),
        ("aaa", "aab", "a"), ("stop stop", "stop", ""), ("", "x", ""), ("ax", "x", "a"),
    ]:  # fmt: skip
        shown = made_by(safe, text, stop)
        if shown != right:
            raise Wrong(f"safe({text!r}, {stop!r}) is not {shown!r}, but {right!r}")


@exercise
def floor_bytes(alone: float, together: float) -> None:
    """Bytes that a decode step reads for each of its output tokens."""
    weights, cache = 2 * (28 * 1024 * 15_360 + 151_936 * 1024), 512 * 114_688
    near("alone", alone, weights + cache, "the layers' matrices, the head, and 512 tokens' keys")
    near("together", together, weights / 256 + cache, "the weights are shared, the cache is not")


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
def dead_rows(rows: float, wanted: float, slots: float) -> None:
    """Of one static batch: rows of logits, those that somebody gets, slots of the cache."""
    script = """
llm, rows, wanted = LLM(device="cpu"), [], 0
head = llm.model_runner.model.lm_head
head.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
for length in (2, 3, 5, 10):
    llm.add_request([7, 8, 9, length], asked(length))
while not llm.is_finished():
    wanted += len(llm.step())
print(json.dumps([sum(rows), wanted, llm.model_runner.kv_cache[0, 0, :, :, 0, 0].numel()]))
"""
    computed, got, allocated = counted(2, script)
    near("rows", rows, computed, "each step computes all four, to the end of the longest", 0)
    near("wanted", wanted, got, "each request gets as many tokens as it asked for", 0)
    near("slots", slots, allocated, "each row is as long as the longest may become", 0)


@exercise
def sort_batch() -> None:
    """An engine whose batches are alike in length."""
    ended = order_of_ends([(2, 9), (2, 3), (2, 9), (2, 3)], max_num_seqs=2)
    if ended[:2] != [1, 3]:
        raise Wrong(f"of four requests, two at a time, these ended first: {ended[:2]}, not [1, 3]")

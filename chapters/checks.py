"""What the checks of exercises share: how one is made, what it tries an engine with.

A check tries numbers, a function, or the package as the executed cells have it, and raises Wrong,
which says what is not right yet.
"""

from __future__ import annotations

import functools
import json
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


def near(name: str, given: float, right: float, hint: str, within: float = 0.02) -> None:
    """Wrong unless a number is right, or as near as its rounding may bring it."""
    if not isinstance(given, Real) or not math.isclose(given, right, rel_tol=within):
        raise Wrong(f"{name} is not {given}: {hint}")


def made_by(rule: Callable, *given: Any) -> Any:
    """What a reader's function makes of something; Wrong where it fails."""
    try:
        return rule(*given)
    except Exception as error:
        raise Wrong(f"of {', '.join(map(repr, given))} it makes no answer: {error!r}") from error


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


BEGIN = """
import json
import sys

sys.path[:] = filter(None, sys.path)  # the folder that we are in may have a nanovllm, too
from nanovllm import LLM, SamplingParams

def asked(num_tokens):
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
"""


@functools.cache
def counted(stage: int, script: str) -> list[int]:
    """What a script counts with the engine of a chapter, on the CPU, in a process of its own."""
    from timing import run_on_stage

    return json.loads(run_on_stage(stage, BEGIN + script))

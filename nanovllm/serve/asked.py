"""From a request's body to sequences that the engine can run."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import count
from typing import Any

from nanovllm.engine.guide import FORM
from nanovllm.engine.requests import make_sequence
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from nanovllm.serve.engine_process import About
from nanovllm.serve.protocol import ChatRequest, CompletionRequest, Sampling
from nanovllm.utils.errors import as_value_error
from nanovllm.utils.tokenizer import Prompt, as_prompt_list

MOST_STOPS, LONGEST_STOP = 16, 256  # strings, characters: each is searched for at every token
# What the engine and its callers know by one name; JSON has other keys for logit_bias.
OWN = {x.name for x in fields(SamplingParams)} & Sampling.model_fields.keys() - {"logit_bias"}


def choices_of(body: Sampling, about: About) -> dict[str, Any]:
    """The options of SamplingParams that a body asks for; ValueError for what none can have."""
    given = {name: getattr(body, name) for name in OWN}
    given = {name: value for name, value in given.items() if value is not None}
    stops = given.get("stop", ())
    stops = (stops,) if isinstance(stops, str) else stops
    if len(stops) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stops):
        raise ValueError(
            f"stop may hold {MOST_STOPS} strings of {LONGEST_STOP} characters, and holds "
            f"{len(stops)}, the longest of {max(map(len, stops))}"
        )
    if body.logit_bias:
        given["logit_bias"] = {as_token_id(key): bias for key, bias in body.logit_bias.items()}
    return {**about.defaults, **given}


def as_token_id(key: str) -> int:
    """The token that a key of logit_bias names; ValueError where it names none."""
    if not key.isascii() or not key.isdecimal():
        raise ValueError(f"logit_bias must have token ids as keys, got {key[:40]!r}")
    return int(key[:12])


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """The prompts of a completion: one, or a list; ValueError for an empty list."""
    prompts = as_prompt_list(body.prompt)
    if not prompts:
        raise ValueError("prompt is empty: give text, token ids, or a list of these")
    return prompts


def completion_params(body: CompletionRequest, about: About) -> SamplingParams:
    """How a completion's tokens are to be chosen; ValueError for what can't be."""
    if body.best_of not in (None, body.n or 1):
        raise ValueError(f"best_of must be n, got {body.best_of}: of more, none is chosen here")
    if body.suffix:
        raise ValueError("suffix is not served: these models write forwards only")
    asked = choices_of(body, about)
    limit = 16 if body.max_tokens is None else body.max_tokens
    if limit == 0 and not body.echo:
        raise ValueError("max_tokens must be at least 1 without echo, got 0")
    scored = body.logprobs if body.echo else None
    asked |= {"max_tokens": max(limit, 1), "logprobs": body.logprobs, "prompt_logprobs": scored}
    return SamplingParams(**asked)


CALL = 'start: "<tool_call>\\n" body "\\n</tool_call>"\nbody: %json '


def call_grammar(body: ChatRequest) -> str:
    """The grammar of one call of a tool, as `tool_choice` demands it: of any, or of a named one."""
    choice, functions = body.tool_choice, [tool["function"] for tool in body.tools or []]
    if isinstance(choice, dict):
        functions = [f for f in functions if f["name"] == choice["function"]["name"]]
    elif choice != "required":
        raise ValueError(f"it must be none, auto, required or a tool, got {choice!r}")
    if not functions:
        raise ValueError("tools hold no such function")
    calls = [
        {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}}
        for f in functions
    ]
    strict = {"type": "object", "required": ["name", "arguments"], "additionalProperties": False}
    schema = {"anyOf": [{**strict, "properties": call} for call in calls]}
    return CALL + json.dumps({**schema, "x-guidance": FORM})


def chat_params(body: ChatRequest, about: About) -> SamplingParams:
    """How a chat's tokens are to be chosen; ValueError for what can't be."""
    asked = choices_of(body, about)
    if body.top_logprobs is not None and not body.logprobs:
        raise ValueError("top_logprobs needs logprobs=true")
    asked["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    asked["max_tokens"] = body.max_completion_tokens or body.max_tokens
    form = body.response_format
    if form is not None and form.type != "text":
        if form.type == "json_schema" and form.json_schema is None:
            raise ValueError("response_format of type json_schema needs a json_schema")
        asked["json_schema"] = form.json_schema.schema_ if form.json_schema else {"type": "object"}
    if body.tool_choice not in (None, "auto", "none"):
        with as_value_error("tool_choice can't be kept to"):
            asked["grammar"] = call_grammar(body)
    return SamplingParams(**asked)


def sequences_of(
    prompts: list[Prompt], params: SamplingParams, n: int, about: About
) -> Iterator[Sequence]:
    """`n` checked sequences of each prompt; where there is a seed, each has its own."""
    for prompt in prompts:
        for index in range(n):
            own = params
            if index and params.seed is not None:
                own = replace(params, seed=(params.seed + index) % 2**63)
            seq = make_sequence(count(), prompt, own, about.tokenizer, about.limits)
            prompt = seq.token_ids  # encoded once
            yield seq

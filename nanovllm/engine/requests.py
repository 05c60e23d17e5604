"""Requests: a prompt and its parameters, checked in full before anything is done for them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.guide import Guide
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.tokenizer import Prompt, as_prompt_list, check_token_ids, encode


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model and the cache can take."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """ValueError for a request that can't be brought to its end, or can't begin."""
        num_tokens = num_prompt_tokens + (max_tokens or 1)
        asked = f"a prompt of {num_prompt_tokens} tokens and max_tokens={max_tokens} exceed"
        if num_tokens > self.max_model_len:
            raise ValueError(f"{asked} max_model_len={self.max_model_len}")
        num_blocks, size = self.num_blocks, self.block_size
        if num_tokens > num_blocks * size:
            raise ValueError(f"{asked} the cache of {num_blocks} blocks of {size} tokens")

    def longest_sequence(self) -> int:
        """The most tokens, prompt and output together, that a request may come to."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


def pair_up(prompts: Any, params: Any) -> list[tuple[Prompt, SamplingParams | None]]:
    """Each prompt with its parameters; ValueError where their numbers differ."""
    prompts = as_prompt_list(prompts)
    if not isinstance(params, list | tuple):
        params = [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
    return list(zip(prompts, params, strict=True))


def make_sequence(
    seq_ids: Iterator[int],
    prompt: Prompt,
    params: SamplingParams | None,
    tokenizer: Any,
    limits: Limits,
) -> Sequence:
    """A checked request; ValueError for a bad one, which uses up no id."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
    token_ids, guide = encode(tokenizer, prompt), None
    check_token_ids((*token_ids, *params.stop_token_ids), limits.vocab_size)
    if problem := params.bias_problem(limits.vocab_size):
        raise ValueError(problem)
    if not token_ids:
        raise ValueError("the prompt is empty: give at least one token")
    limits.check_length(len(token_ids), params.max_tokens)
    if params.max_tokens is None:
        params = replace(params, max_tokens=limits.longest_sequence() - len(token_ids))
    if params.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and the checkpoint has none")
    if params.json_schema is not None or params.grammar is not None:
        guide = Guide(params, tokenizer, limits.vocab_size)
    seq = Sequence(next(seq_ids), token_ids, params, params.seed, guide=guide)
    if params.stop:
        seq.detokenizer = Detokenizer(tokenizer, params.stop)
    return seq

"""The checkpoint's tokenizer."""

import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.utils.errors import as_value_error
from nanovllm.utils.options import as_python


def load_tokenizer(folder: Path) -> Any:
    """The folder's transformers tokenizer, or None where the folder holds none."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    with as_value_error(f"{folder} can't be read"):
        found = [name for name in names if (folder / name).is_file()]
    if not found:
        return None
    from transformers import AutoTokenizer

    with as_value_error(f"{folder}: {', '.join(found)} can't be read"):
        return AutoTokenizer.from_pretrained(folder)


Prompt = str | Sequence[int] | np.ndarray  # text, or token ids
Prompts = Prompt | Sequence[Prompt]  # one, or a list


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt's token ids, in a list of its own; ValueError for what is no prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: give token ids, not text")
        with as_value_error("the prompt is no Unicode text"):
            prompt.encode()
        with as_value_error("the tokenizer can't encode the prompt"):
            return tokenizer.encode(prompt)
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
        return prompt.tolist()
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"a prompt is text or a list of token ids, got {prompt!r}")
    if set(map(type, prompt)) <= {int}:  # as nearly always, and then it costs next to nothing
        return list(prompt)
    return [as_python(token_id) for token_id in prompt]


def check_token_ids(token_ids: Iterable[object], vocab_size: int) -> None:
    """ValueError for the first that is not in the vocabulary."""
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id!r} is outside the vocabulary of {vocab_size}")


def as_prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str) or isinstance(prompts, np.ndarray) and prompts.ndim == 1:
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts must be text, token ids or a list of these, got {prompts!r}")
    if prompts and isinstance(prompts[0], numbers.Integral):
        return [list(prompts)]
    return list(prompts)

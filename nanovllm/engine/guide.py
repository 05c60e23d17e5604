"""A request whose text must follow a grammar: which tokens may come next."""

from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.errors import as_value_error

MOST_GRAMMAR = 30_000  # characters of a schema or grammar; larger ones take long to read
# JSON as Python writes it: a small model that may write any white space may write it for ever.
FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@lru_cache(maxsize=2)  # a table of the whole vocabulary: a second, where it is large
def token_table(tokenizer: Any, vocab_size: int) -> Any:
    """The tokens as llguidance wants them."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)


def prepare_guides(tokenizer: Any, vocab_size: int) -> None:
    """Make the table before a request needs it, where it can be made."""
    with suppress(Exception):  # a request that needs it is told what is wrong
        token_table(tokenizer, vocab_size)


class Guide:
    """Follows one request's text through its grammar."""

    def __init__(self, params: SamplingParams, tokenizer: Any, vocab_size: int):
        """ValueError for a grammar that is none, or where there is nothing to read it with."""
        if params.grammar is not None and params.json_schema is not None:
            raise ValueError("json_schema and grammar are not both to be had")
        if tokenizer is None or tokenizer.eos_token_id is None:
            raise ValueError("a grammar needs a tokenizer with an end-of-sequence token")
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ValueError("grammars need another package: pip install llguidance") from error
        with as_value_error("json_schema" if params.grammar is None else "grammar"):
            grammar = params.grammar
            if grammar is None:
                grammar = LLMatcher.grammar_from_json_schema(params.json_schema or {}, FORM)
            if len(grammar) > MOST_GRAMMAR:
                raise ValueError(f"more than {MOST_GRAMMAR:,} characters")
            self.matcher = LLMatcher(token_table(tokenizer, vocab_size), grammar, log_level=0)
            if problem := self.matcher.get_error():
                raise ValueError(problem)
        self.num_read, self.width, self.end = 0, -(-vocab_size // 32), tokenizer.eos_token_id

    def mask(self, completion: list[int]) -> np.ndarray:
        """Which tokens may follow, [vocab_size / 32] int32: a bit each, the lowest first.

        Once the text is complete, or where the grammar can't go on, the end of the sequence alone.
        """
        for token_id in completion[self.num_read :]:
            if not self.matcher.is_stopped():
                self.matcher.consume_token(token_id)
        self.num_read = len(completion)
        bits = np.zeros(self.width, np.int32)
        if not self.matcher.is_stopped():
            found = np.frombuffer(self.matcher.compute_bitmask(), np.int32)[: self.width]
            bits[: len(found)] = found
        if not bits.any():
            bits.view(np.uint32)[self.end // 32] = 1 << self.end % 32
        return bits

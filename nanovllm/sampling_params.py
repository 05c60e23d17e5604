"""How one request wants its tokens chosen."""

from dataclasses import dataclass

from nanovllm.utils.options import as_python, check_options, option


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request chooses its tokens, and when it stops; frozen once checked.

    A misfit raises ValueError.
    """

    temperature: float = option(1.0, "0 is greedy; higher is more varied", minimum=0)
    max_tokens: int | None = option(
        64, "stop after this many tokens; None: once max_model_len is reached", minimum=1
    )
    ignore_eos: bool = option(False, "go on after an end-of-sequence token")
    top_k: int = option(0, "sample among the k likeliest tokens (0: all)", minimum=0, maximum=2**31)
    top_p: float = option(
        1.0, "sample among the likeliest tokens of total probability p", above=0, maximum=1
    )
    min_p: float = option(
        0.0, "drop tokens with less than this share of the likeliest one's", minimum=0, maximum=1
    )
    seed: int | None = option(
        None,
        "same seed, same tokens, whatever else is in the batch: in float32 on a CPU; on a GPU in "
        "half precision rounding may depend on the batch",
        minimum=-(2**63),
        maximum=2**63 - 1,
    )
    stop: str | list[str] | tuple[str, ...] = option((), "stop at this text; it is not returned")
    stop_token_ids: list[int] | tuple[int, ...] = option((), "stop after one of these tokens")
    repetition_penalty: float = option(
        1.0, "divide the logits of tokens that prompt or completion hold by this", above=0
    )
    presence_penalty: float = option(
        0.0, "subtract this for tokens that the completion holds", minimum=-2, maximum=2
    )
    frequency_penalty: float = option(
        0.0, "subtract this for each time that the completion holds it", minimum=-2, maximum=2
    )
    logprobs: int | None = option(
        None,
        "tell each token's log-probability, and those of so many likely ones",
        minimum=0,
        maximum=20,
        offered=False,  # the command line prints text
    )
    prompt_logprobs: int | None = option(
        None, "the same for each token of the prompt", minimum=0, maximum=20, offered=False
    )
    logit_bias: dict[int, float] | None = option(
        None, "add this to the logits of these tokens, -100 to 100", offered=False
    )
    json_schema: dict | None = option(
        None, "write JSON that follows this schema ({}: any JSON)", offered=False
    )
    grammar: str | None = option(
        None, "write a text of this grammar (Lark, in llguidance's dialect)", offered=False
    )

    @property
    def is_edited(self) -> bool:
        """Are logits to be changed?"""
        wishes = self.logit_bias, self.json_schema, self.grammar
        return any(wish is not None for wish in wishes)

    def bias_problem(self, vocab_size: int) -> str | None:
        """What is wrong with logit_bias, if anything is."""
        for token_id, bias in (self.logit_bias or {}).items():
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                return (
                    f"logit_bias: token id {token_id!r} is outside the vocabulary of {vocab_size}"
                )
            if not isinstance(bias, int | float) or not -100 <= bias <= 100:  # NaN fails it too
                return f"logit_bias must be numbers from -100 to 100, got {bias!r}"
        return None

    @property
    def is_scored(self) -> bool:
        """Are log-probabilities wanted?"""
        return self.logprobs is not None or self.prompt_logprobs is not None

    def __post_init__(self) -> None:
        check_options(self)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must hold non-empty strings, got {stop!r}")
        stop_token_ids = tuple(map(as_python, self.stop_token_ids))
        if not all(type(token_id) is int for token_id in stop_token_ids):
            raise ValueError(f"stop_token_ids must hold integers, got {stop_token_ids!r}")
        # A frozen class sets its own fields this way.
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)

"""What callers get, in the words of OpenAI's API: plain dictionaries."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanovllm.engine.outputs import RequestMetrics
from nanovllm.serve.token_bytes import token_bytes, token_text

# A token and its log-probability first (None where nothing stands before it), then the likeliest.
Scores = Mapping[int, float | None]


def usage_of(num_prompt: int, num_completion: int, ends: Iterable[RequestMetrics | None]) -> dict:
    """How many tokens a call took; what the prefix cache spared is among the prompt's."""
    cached = sum(end["num_cached_tokens"] for end in ends if end)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_score(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    """One token of a chat's log-probabilities."""
    raw = token_bytes(tokenizer, token_id)
    text = raw.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def chat_logprobs(tokenizer: Any, told: list[dict[int, float]] | None, num_top: int) -> dict | None:
    """The log-probabilities of a chat's tokens; None where nobody has asked."""
    if told is None:
        return None
    content = []
    for scores in told:
        (own, logprob), *_ = scores.items()
        top = sorted(scores.items(), key=lambda score: -score[1])[:num_top]
        likely = [chat_score(tokenizer, *score) for score in top]
        content.append({**chat_score(tokenizer, own, logprob), "top_logprobs": likely})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Any, told: Sequence[Scores] | None, num_top: int, offset: int
) -> dict[str, list] | None:
    """The log-probabilities of a completion's tokens; None where nobody has asked.

    told: of each token, with None as log-probability where nothing stands before it; offset: where
    in the text the first token begins, in characters.
    """
    if told is None:
        return None
    names = "tokens", "token_logprobs", "top_logprobs", "text_offset"
    columns: dict[str, list] = {name: [] for name in names}
    for scores in told:
        (own, logprob), *_ = scores.items()
        text = token_text(tokenizer, own)
        top: dict[str, float] | None = None
        if logprob is not None:
            logprob = max(logprob, -9999.0)
            likely = sorted(((value or 0.0, i) for i, value in scores.items()), reverse=True)
            best = reversed(likely[:num_top])  # of tokens that read the same, the likeliest stays
            top = {token_text(tokenizer, i): max(score, -9999.0) for score, i in best}
        for name, value in zip(names, (text, logprob, top, offset), strict=True):
            columns[name].append(value)
        offset += len(text)
    return columns

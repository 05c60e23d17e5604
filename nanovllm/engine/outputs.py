"""What a caller gets: results, and pieces of them while they grow."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypedDict

from nanovllm.engine.detokenizer import Detokenizer

if TYPE_CHECKING:  # it belongs to chapter 1
    from nanovllm.engine.sequence import Sequence


class StreamPiece(TypedDict):
    """What is new of a request; `stream` yields one after the other."""

    text: str
    token_ids: list[int]
    finish_reason: str | None  # None but in the last piece
    logprobs: list[dict[int, float]] | None  # of these tokens, where they were asked for


class RequestMetrics(TypedDict):
    """What became of one request; times in seconds, None where too few tokens came."""

    time_to_first_token: float | None  # since the request was added
    time_per_output_token: float | None  # the mean, of those after the first
    num_cached_tokens: int  # prompt tokens that the prefix cache saved
    num_preemptions: int


class RequestOutput(StreamPiece):
    """What `generate` returns for one prompt; also the last piece of a stream."""

    error: str | None  # what went wrong, where finish_reason is "error"
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, float] | None] | None  # None for the first token


def metrics_of(seq: "Sequence") -> RequestMetrics:
    """What became of a request."""
    first = last = None
    if seq.num_completion_tokens > 0:
        first = seq.first_token_time - seq.arrival_time
    if seq.num_completion_tokens > 1:
        last = seq.last_token_time - seq.first_token_time
        last /= seq.num_completion_tokens - 1
    return RequestMetrics(
        time_to_first_token=first,
        time_per_output_token=last,
        num_cached_tokens=seq.num_hit_tokens,
        num_preemptions=seq.num_preemptions,
    )


def output_of(seq: "Sequence", tokenizer: Any) -> RequestOutput:
    """A finished sequence's result; its text ends before the stop string that ended it."""
    text = text_of(seq, tokenizer)  # first: it may fail, and then that is how the request ended
    asked, token_ids = seq.params, seq.completion_token_ids
    return RequestOutput(
        text=text,
        token_ids=token_ids,
        logprobs=None if asked.logprobs is None else seq.logprobs[: len(token_ids)],
        prompt_logprobs=None if asked.prompt_logprobs is None else seq.prompt_logprobs,
        finish_reason=seq.finish_reason,
        error=str(seq.error or "") or None,
        metrics=metrics_of(seq),
    )


def text_of(seq: "Sequence", tokenizer: Any) -> str:
    """A finished sequence's text, as far as it has not been taken.

    RuntimeError for one that another caller's failed step has swept away.
    """
    if seq.error is not None and seq.finish_reason == "abort":
        raise RuntimeError(f"the request was lost: {seq.error!r} in a step") from seq.error
    if tokenizer is None:
        return ""
    try:
        if seq.detokenizer is not None:
            seq.detokenizer.flush()
            return seq.detokenizer.take_ready()
        return Detokenizer(tokenizer).decode_all(seq.completion_token_ids)
    except Exception as error:
        seq.finish("error", error)
        return ""


class Outbox:
    """What is new of one request; steps fill it, and one reader, in any thread, takes from it.

    The reader never looks at what a step is changing. Made before the request is queued.
    """

    def __init__(self, seq: "Sequence", tokenizer: Any):
        self.seq, self.tokenizer = seq, tokenizer
        self.unread: deque[int] = deque()
        seq.unread = self.unread
        if tokenizer is not None:
            seq.detokenizer = Detokenizer(tokenizer, seq.params.stop)

    num_taken = 0  # tokens

    def take(self) -> StreamPiece:
        """What has come since the last call; with a finish_reason, and only then, it is the last.

        The last piece is a `RequestOutput`.
        """
        seq = self.seq
        is_last = seq.is_finished  # asked first: then nothing more comes behind the piece
        token_ids = [self.unread.popleft() for _ in range(len(self.unread))]
        start, self.num_taken = self.num_taken, self.num_taken + len(token_ids)
        logprobs = seq.logprobs[start : self.num_taken] if seq.params.logprobs is not None else None
        if is_last:
            piece = output_of(seq, self.tokenizer)  # its text is what has not been taken
            piece["token_ids"], piece["logprobs"] = token_ids, logprobs
            return piece
        text = seq.detokenizer.take_ready() if seq.detokenizer else ""
        return StreamPiece(text=text, token_ids=token_ids, logprobs=logprobs, finish_reason=None)

    def pieces(self, step: Callable[[], object]) -> Iterator[StreamPiece]:
        """Every piece that holds something, to the last; `step` is called while none is there."""
        is_last = False
        while not is_last:
            if not self.seq.is_finished:  # else another caller's steps have finished it
                step()
            piece = self.take()
            is_last = piece["finish_reason"] is not None
            if piece["token_ids"] or piece["text"] or is_last:
                yield piece

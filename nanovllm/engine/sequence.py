"""One request: its tokens, its parameters, how far it has come."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from nanovllm.engine.block import Prefix
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:  # it needs NumPy
    from nanovllm.engine.guide import Guide


class SequenceStatus(Enum):
    """Where a request stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens generated after it."""

    seq_id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int | None
    num_prompt_tokens: int = field(init=False)
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort" or "error" once finished
    error: BaseException | None = None  # what went wrong, if anything did
    arrival_time: float = 0.0  # when it was added, in seconds by time.perf_counter
    detokenizer: Detokenizer | None = None  # where text is wanted before the end
    unread: deque[int] | None = None  # tokens for one who reads along, perhaps in another thread
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)  # its blocks, in the order of the text
    prefixes: list[Prefix] = field(default_factory=list)  # its full blocks that are in the cache
    num_cached_tokens: int = 0  # tokens that were in the cache when it was admitted
    epoch: int = 0  # the block manager's epoch when it was admitted
    num_scheduled_tokens: int = 0  # tokens that it brings in the next step
    num_preemptions: int = 0
    num_hit_tokens: int = 0  # prompt tokens that were in the cache when it was first admitted
    first_token_time: float = 0.0  # in seconds, by time.perf_counter; once there is a token
    last_token_time: float = 0.0
    choices: bytes = b""  # its line of CHOICES, once it has been made
    asks: int = 0  # what it asks of the sampler, as bits; made with the line
    num_pending_tokens: int = 0  # placeholders at the end of token_ids: sampled, and not yet read
    logprobs: list[dict[int, float]] = field(default_factory=list)  # of the completion's tokens
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=lambda: [None])

    def take_score(
        self, position: int, token_id: int, logprob: float, likely: list[int], logprobs: list[float]
    ) -> None:
        """Note how likely a token of this sequence was, and which ones were the likeliest."""
        taken: list = self.prompt_logprobs
        at, count = position, self.params.prompt_logprobs
        if position >= self.num_prompt_tokens:
            taken = self.logprobs
            at, count = position - self.num_prompt_tokens, self.params.logprobs
        if at == len(taken):
            taken.append({token_id: logprob, **dict(zip(likely[:count], logprobs[:count]))})

    guide: "Guide | None" = None  # what its text must follow

    @property
    def num_missing_tokens(self) -> int:
        """Tokens that are to be run: those whose keys and values are not in the cache yet.

        The last token of all is never run, since nothing follows it. And what follows a token that
        the host has not read can't be guided: such a sequence sits out one step.
        """
        assert self.params.max_tokens is not None, "a request without a limit was admitted"
        if self.guide is not None and self.num_pending_tokens > 0:
            return 0
        longest = self.num_prompt_tokens + self.params.max_tokens - 1
        return min(len(self.token_ids), longest) - self.num_computed_tokens

    @property
    def is_running(self) -> bool:
        """It has blocks, and a part in each step."""
        return self.status is SequenceStatus.RUNNING

    def note_time(self, now: float) -> None:
        """A token is about to be received."""
        if self.num_completion_tokens == 0:
            self.first_token_time = now
        self.last_token_time = now

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the completion together."""
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the host has read."""
        return len(self.token_ids) - self.num_pending_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, as far as they have been read."""
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The tokens generated so far, an end-of-sequence token included."""
        return self.token_ids[self.num_prompt_tokens : self.num_known_tokens]

    @property
    def is_finished(self) -> bool:
        """No further token will come."""
        return self.status is SequenceStatus.FINISHED

    def expect_token(self, row: int) -> None:
        """Add a placeholder for what this row of the step that runs now will sample."""
        self.token_ids.append(-1 - row)
        self.num_pending_tokens += 1

    def append_token(self, token_id: int) -> None:
        """Put the token that was sampled in the place of the oldest placeholder."""
        self.token_ids[self.num_known_tokens] = token_id
        self.num_pending_tokens -= 1

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """Mark the sequence finished, for the reason that the caller will read.

        What a step that still runs samples for it is not wanted.
        """
        del self.token_ids[self.num_known_tokens :]
        self.num_pending_tokens = 0
        self.finish_reason, self.error = reason, error
        self.status = SequenceStatus.FINISHED  # last: another thread may be looking

    def receive(self, token_id: int, eos_token_ids: Collection[int]) -> None:
        """Take the token that was sampled, and finish if nothing is to follow it.

        -1 stands for a token that could not be sampled. Whatever fails ends this request alone.
        """
        if token_id < 0:
            return self.finish("error", RuntimeError("the model's logits are NaN, not a number"))
        self.append_token(token_id)
        is_eos = token_id in eos_token_ids and not self.params.ignore_eos
        reason, error = None, None
        if is_eos or token_id in self.params.stop_token_ids:
            reason = "stop"
        elif self.num_completion_tokens == self.params.max_tokens:
            reason = "length"
        try:
            if self.read_text(token_id, is_last=reason is not None):
                reason = "stop"
        except Exception as trouble:
            reason, error = "error", trouble
        if self.unread is not None:
            self.unread.append(token_id)
        if reason is not None:
            self.finish(reason, error)

    def read_text(self, token_id: int, is_last: bool) -> bool:
        """Decode the newest token, where text is wanted; was a stop string in it?"""
        if self.detokenizer is None:
            return False
        self.detokenizer.append(token_id)
        if is_last:
            self.detokenizer.flush()
        return self.detokenizer.has_stopped

"""One request: its tokens, its parameters, how far it has come."""

from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm.engine.block import Prefix
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.sampling_params import SamplingParams


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
    finish_reason: str | None = None  # "stop", "length" or "abort" once finished
    detokenizer: Detokenizer | None = None  # where text is wanted before the end
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)  # its blocks, in the order of the text
    prefixes: list[Prefix] = field(default_factory=list)  # its full blocks that are in the cache
    num_cached_tokens: int = 0  # tokens that were in the cache when it was admitted
    epoch: int = 0  # the block manager's epoch when it was admitted
    num_scheduled_tokens: int = 0  # tokens that it brings in the next step
    num_preemptions: int = 0
    num_hit_tokens: int = 0  # prompt tokens that were in the cache when it was first admitted
    arrival_time: float = 0.0  # these in seconds, by time.perf_counter
    first_token_time: float | None = None
    last_token_time: float | None = None

    @property
    def num_missing_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_running(self) -> bool:
        """It has blocks, and a part in each step."""
        return self.status is SequenceStatus.RUNNING

    def __post_init__(self):
        self.num_prompt_tokens = len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the completion together."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def completion_token_ids(self) -> list[int]:
        """The tokens generated so far, an end-of-sequence token included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def last_token(self) -> int:
        """The newest token."""
        return self.token_ids[-1]

    @property
    def is_finished(self) -> bool:
        """No further token will come."""
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int) -> None:
        """Add the token that was sampled for this sequence."""
        self.token_ids.append(token_id)

    def finish(self, reason: str) -> None:
        """Mark the sequence finished, for the reason that the caller will read."""
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason

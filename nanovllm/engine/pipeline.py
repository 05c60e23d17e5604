"""The steps in flight: launched, and not accounted for. Plain Python."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from nanovllm.engine.scores import Score
from nanovllm.engine.sequence import Sequence


class Result(Protocol):
    """What a step samples."""

    def token_ids(self) -> list[int]:
        """One token for each sequence of the step; waits for the device."""

    def told(self, token_ids: list[int]) -> Iterable[Score]:
        """How likely tokens were, as far as somebody has asked."""


@dataclass(slots=True)
class Launched:
    """A step that the device has been given."""

    seqs: list[Sequence]
    result: Result
    grows: list[bool]  # does it sample a token that counts for this sequence?


class Pipeline:
    """The steps in flight, the oldest first: at most two.

    A placeholder -1 - i stands for what row i of *the step before* samples. So when a step is
    launched, all steps but the newest must have been accounted for.
    """

    def __init__(self) -> None:
        self.steps: deque[Launched] = deque()

    def __len__(self) -> int:
        return len(self.steps)

    def push(self, seqs: list[Sequence], result: Result) -> None:
        """A step has been launched: its tokens count as computed, the sampled ones will come."""
        grows = []
        for row, seq in enumerate(seqs):
            seq.num_computed_tokens += seq.num_scheduled_tokens
            grows.append(seq.num_computed_tokens == len(seq))
            if grows[-1]:
                seq.expect_token(row)
        self.steps.append(Launched(seqs, result, grows))

    def pop(self) -> tuple[list[Sequence], list[int | None]]:
        """The oldest step's sequences, and the token that each gains by it.

        None where it gains nothing: more of its prompt is to come, or it has ended meanwhile.
        """
        step = self.steps.popleft()
        token_ids = step.result.token_ids()
        for row, position, token_id, logprob, likely, logprobs in step.result.told(token_ids):
            if not (seq := step.seqs[row]).is_finished:
                seq.take_score(position, token_id, logprob, likely, logprobs)
        rows = zip(step.seqs, token_ids, step.grows, strict=True)
        gains = [t if grows and not seq.is_finished else None for seq, t, grows in rows]
        return step.seqs, gains

    def forget(self) -> None:
        """What still runs is for nobody."""
        self.steps.clear()

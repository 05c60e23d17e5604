"""What comes of a step, once it has run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nanovllm.engine.asked import Asked
from nanovllm.engine.graphs import Ran
from nanovllm.engine.scores import Score
from nanovllm.engine.step_inputs import Step
from nanovllm.kernels.logprobs import logprobs_of


@dataclass(slots=True)
class Result:
    """What a step samples, once it has run."""

    sampled: torch.Tensor  # [num_seqs] int64, on the host
    done: torch.cuda.Event | None = None  # None: it is there already
    asked: Asked | None = None
    scores: torch.Tensor | None = None  # from logprobs_of, on the host

    def with_scores(self, asked: Asked, scores: torch.Tensor | None) -> "Result":
        """This result, with the scores that were asked for."""
        self.asked, self.scores = asked, scores
        return self

    def told(self, token_ids: list[int]) -> Iterator[Score]:
        """The scores that were asked for; token_ids: what `token_ids` has returned."""
        if self.asked is None or self.scores is None:
            return
        n = self.scores.shape[1] // 2
        own, top, ids = self.scores.split([1, n, n], dim=1)
        found = own[:, 0].tolist(), ids.long().tolist(), top.tolist()
        for (row, at, _, token), *told in zip(self.asked.scores.tolist(), *found, strict=True):
            yield Score(row, at, token_ids[row] if token < 0 else token, *told)

    def token_ids(self) -> list[int]:
        """One new token id for each sequence: the one place where the host waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        return self.sampled.tolist()


def read_later(source: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which is there when what the device has been given so far is done."""
    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    return copy.copy_(source, non_blocking=True)


def result_of(sampled: torch.Tensor) -> Result:
    """The result of a step that leaves its tokens in `sampled`, [num_seqs] int64."""
    copy = read_later(sampled)
    done = torch.cuda.Event() if sampled.is_cuda else None
    if done is not None:
        done.record()
    return Result(copy, done)


SCORED = 256  # rows at a time, for logits are large


def score_tokens(
    step: Step,
    ran: Ran,
    input_buffer: torch.Tensor,
    sampled: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor | None:
    """`logprobs_of` the tokens that are asked for, on their way to the host; None without any.

    input_buffer: where the step's inputs lie; sampled: what the rows have sampled, as many or more;
    compute_logits: from hidden states, [n, hidden_size], to this rank's logits; gather: to those of
    all ranks, [n, vocab_size]
    """
    if len(step.asked.scores) == 0:
        return None
    wanted = torch.from_numpy(step.asked.scores)
    wanted = wanted.pin_memory() if sampled.is_cuda else wanted
    wanted = wanted.to(sampled.device, non_blocking=True)
    hidden, at = ran.hidden, wanted[:, 0]
    if ran.tokens is not None:
        hidden, last = ran.tokens, step.layout.tensors(input_buffer)["last"]
        at = last[at] - wanted[:, 2]
    parts = [
        logprobs_of(gather(compute_logits(some)), which, sampled, step.asked.num_top)
        for some, which in zip(hidden[at].split(SCORED), wanted.split(SCORED), strict=True)
    ]
    return read_later(parts[0] if len(parts) == 1 else torch.cat(parts))

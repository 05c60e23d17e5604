"""Log-probabilities: of which tokens they are wanted, and what comes of it. No torch."""

from typing import NamedTuple

import numpy as np

from nanovllm.engine.sequence import Sequence


class Score(NamedTuple):
    """What the model says of one token."""

    row: int  # of its step
    position: int  # in its sequence
    token_id: int
    logprob: float
    likely: list[int]  # the likeliest tokens
    logprobs: list[float]  # and theirs; as many of both as the step's hungriest request wants


def wanted_scores(seqs: list[Sequence]) -> np.ndarray:
    """The tokens whose scores a step of these sequences is to tell, [num_scores, 4] int64.

    Of each: its row; its position; how many tokens the one before it stands before the row's last;
    and the token, -1 if it is yet to be sampled.
    """
    wanted: list[tuple[int, int, int, int]] = []
    for row, seq in enumerate(seqs):
        start, stop = seq.num_computed_tokens, seq.num_computed_tokens + seq.num_scheduled_tokens
        if seq.params.prompt_logprobs is not None:
            places = range(start + 1, min(stop + 1, seq.num_prompt_tokens))
            wanted += [(row, at, stop - at, seq.token_ids[at]) for at in places]
        if seq.params.logprobs is not None and stop == len(seq):
            wanted.append((row, stop, 0, -1))
    return np.array(wanted, np.int64).reshape(-1, 4)

"""What the sequences of a step ask of the sampler."""

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.edits import Edits
from nanovllm.engine.scores import wanted_scores
from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class Asked:
    """What a step's sequences ask of the sampler, as far as the host has to know."""

    all_greedy: bool
    more: bool  # does one ask for more than a temperature?
    scores: np.ndarray  # from wanted_scores
    num_top: int  # of how many likely tokens beside each
    edits: Edits | None = None  # what is changed in logits

    @classmethod
    def of(cls, put: dict[str, np.ndarray], seqs: list[Sequence]) -> "Asked":
        """What these sequences ask for, whose inputs have been put down already."""
        is_warm, costs = put["temperatures"] > 0, put["presences"].any() or put["frequencies"].any()
        cuts = (put["top_ks"] > 0) | (put["top_ps"] < 1) | (put["min_ps"] > 0)
        more = (cuts & is_warm).any() or costs or (put["repetitions"] != 1).any()
        scored = [seq.params for seq in seqs if seq.params.is_scored]
        num_top = max((n or 0 for p in scored for n in (p.logprobs, p.prompt_logprobs)), default=0)
        scores = wanted_scores(seqs if scored else [])
        return cls(len(seqs) > 0 and not is_warm.any(), bool(more), scores, num_top)

    @property
    def reads_prompts(self) -> bool:
        """Are tokens of prompts among those that are scored?"""
        return len(self.scores) > 0 and bool((self.scores[:, 3] >= 0).any())

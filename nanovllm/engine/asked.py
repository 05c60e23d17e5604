"""What the sequences of a step ask of the sampler."""

from dataclasses import dataclass

import numpy as np

from nanovllm.engine.scores import wanted_scores
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import is_filtered


@dataclass(slots=True)
class Asked:
    """What a step's sequences ask of the sampler, as far as the host has to know."""

    all_greedy: bool
    more: bool  # does one ask for more than a temperature?
    scores: np.ndarray  # from wanted_scores
    num_top: int  # of how many likely tokens beside each

    @classmethod
    def of(cls, seqs: list[Sequence]) -> "Asked":
        """What these sequences ask for."""
        params = [seq.params for seq in seqs]
        all_greedy = len(params) > 0 and all(p.temperature == 0 for p in params)
        more = any(is_filtered(p) or p.is_penalised for p in params)
        scored = [p for p in params if (p.logprobs, p.prompt_logprobs) != (None, None)]
        num_top = max((n or 0 for p in scored for n in (p.logprobs, p.prompt_logprobs)), default=0)
        return cls(all_greedy, more, wanted_scores(seqs if scored else []), num_top)

    @property
    def reads_prompts(self) -> bool:
        """Are tokens of prompts among those that are scored?"""
        return len(self.scores) > 0 and bool((self.scores[:, 3] >= 0).any())

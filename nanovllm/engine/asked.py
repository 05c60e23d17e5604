"""What sequences ask of the sampler."""

from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, or_

import numpy as np

from nanovllm.engine.edits import Edits, edits_of
from nanovllm.engine.scores import wanted_scores
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

CHOICES = {  # name: (type, what of the sequence it is, what the padding is)
    "seeds": (np.int64, "seed", 0),
    "temperatures": (np.float32, "params.temperature", 0),
    "top_ks": (np.int64, "params.top_k", 0),
    "top_ps": (np.float32, "params.top_p", 1),
    "min_ps": (np.float32, "params.min_p", 0),
    "repetitions": (np.float32, "params.repetition_penalty", 1),
    "presences": (np.float32, "params.presence_penalty", 0),
    "frequencies": (np.float32, "params.frequency_penalty", 0),
    "prompt_lens": (np.int64, "num_prompt_tokens", 0),
}

WARM, MORE = 1, 2  # bits: for noise; for more than a temperature

SCORED = 4  # another bit: for log-probabilities

EDITED = 8  # another bit: for logits that are changed


def asks(params: SamplingParams) -> int:
    """What a request asks of the sampler, as bits."""
    is_warm, costs = params.temperature > 0, (params.presence_penalty, params.frequency_penalty)
    cuts = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    more = (is_warm and cuts) or params.repetition_penalty != 1 or any(costs)
    bits = WARM * is_warm | MORE * more | SCORED * params.is_scored
    return bits | EDITED * params.is_edited


@dataclass(slots=True)
class Asked:
    """What a step's sequences ask of the sampler, as far as the host has to know."""

    all_greedy: bool
    more: bool  # does one ask for more than a temperature?
    scores: np.ndarray  # from wanted_scores
    num_top: int  # of how many likely tokens beside each
    edits: Edits | None = None  # what is changed in logits

    @classmethod
    def of(cls, seqs: list[Sequence]) -> "Asked":
        """What these sequences ask for, whose lines have been made already."""
        bits = reduce(or_, [seq.asks for seq in seqs], 0)
        scored = [seq.params for seq in seqs] if bits & SCORED else []
        num_top = max((n or 0 for p in scored for n in (p.logprobs, p.prompt_logprobs)), default=0)
        scores, edits = wanted_scores(seqs if scored else []), None
        if bits & EDITED:
            edits = edits_of(seqs)
        return cls(len(seqs) > 0 and not bits & WARM, bool(bits & MORE), scores, num_top, edits)

    @property
    def reads_prompts(self) -> bool:
        """Are tokens of prompts among those that are scored?"""
        return len(self.scores) > 0 and bool((self.scores[:, 3] >= 0).any())


LINE = np.dtype([(name, kind) for name, (kind, _, _) in CHOICES.items()])
HOTTEST = float(np.finfo(np.float32).max)  # a higher temperature would be infinite on the device
values_of = attrgetter(*(attribute for _, attribute, _ in CHOICES.values()))


def line_of(seq: Sequence) -> bytes:
    """A sequence's line of CHOICES, which is made once, with what it asks."""
    if not seq.choices:
        values = tuple(min(value, HOTTEST) for value in values_of(seq))
        seq.choices, seq.asks = np.array([values], LINE).tobytes(), asks(seq.params)
    return seq.choices

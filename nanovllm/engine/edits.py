"""What requests change in their logits before a token is drawn from them."""

from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class Edits:
    """The changes of one step; arrays, so that they can be sent to other ranks."""

    rows: np.ndarray  # [n] int64: row `rows[i]` of the step gets
    token_ids: np.ndarray  # [n] int64: at this token
    biases: np.ndarray  # [n] float32: this much more
    guided: np.ndarray  # [m] int64: row `guided[i]` may have the tokens of
    masks: np.ndarray  # [m, vocab_size / 32] int32: a bit each, the lowest first

    def apply_(self, logits: torch.Tensor, first: int) -> None:
        """Change the logits, [num_seqs, num_columns], in place; they begin at column `first`."""
        columns, device = logits.shape[1], logits.device
        at = self.token_ids - first
        own = (at >= 0) & (at < columns)
        if own.any():
            where = tuple(torch.from_numpy(x[own]).to(device) for x in (self.rows, at))
            biases = torch.from_numpy(self.biases[own]).to(device, logits.dtype)
            logits.index_put_(where, biases, accumulate=True)
        if len(self.guided) > 0:
            rows = torch.from_numpy(self.guided).to(device)
            masks = torch.from_numpy(self.masks).to(device)
            column = torch.arange(first, first + columns, device=device)
            words = masks[:, (column // 32).clamp(max=masks.shape[1] - 1)]
            allowed = (words >> (column % 32) & 1).bool() & (column < 32 * masks.shape[1])
            logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def edits_of(seqs: list[Sequence]) -> Edits | None:
    """What the sequences of a step change in their logits; None where none does."""
    biased: list[tuple[int, int, float]] = []
    guided: list[tuple[int, np.ndarray]] = []
    for row, seq in enumerate(seqs):
        if seq.params.logit_bias is not None:
            biased += [(row, *item) for item in seq.params.logit_bias.items()]
        is_sampled = seq.num_computed_tokens + seq.num_scheduled_tokens == len(seq)
        if seq.guide is not None and is_sampled:  # else more of its prompt is to come
            guided.append((row, seq.guide.mask(seq.completion_token_ids)))
    if not biased and not guided:
        return None
    return Edits(
        np.array([row for row, _, _ in biased], np.int64),
        np.array([token_id for _, token_id, _ in biased], np.int64),
        np.array([bias for _, _, bias in biased], np.float32),
        np.array([row for row, _ in guided], np.int64),
        np.array([mask for _, mask in guided], np.int32),
    )


def edit_(logits: torch.Tensor, edits: Edits | None, first: int) -> None:
    """Change the logits, [num_seqs, num_columns] from column `first` on, where somebody asks."""
    if edits is not None:
        edits.apply_(logits, first)

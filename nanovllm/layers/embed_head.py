"""The two ends of the model: token ids to vectors, vectors to logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.small_linear import linear
from nanovllm.layers.layer import Layer, shape_of


class VocabParallelEmbedding(Layer):
    """Looks up a vector per token. token_ids: [num_tokens] -> [num_tokens, hidden_size]

    Cut by the vocabulary: a rank holds the vectors of the tokens from `first` on, padded.
    """

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        size, self.vocab_size = -(-vocab_size // self.group.size), vocab_size
        self.first = self.group.rank * size
        self.num_real = max(0, min(size, vocab_size - self.first))
        self.weight = nn.Parameter(torch.empty(size, hidden_size))

    def take(self, kind: str, stored: Any) -> torch.Tensor:
        """This rank's rows, and zeros for the padding."""
        if shape_of(stored)[0] != self.vocab_size:
            return stored[...]
        own = stored[self.first : self.first + self.num_real]
        return F.pad(own, (0, 0, 0, len(self.weight) - len(own)))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return self.weight[token_ids]
        at = token_ids - self.first
        is_own = (at >= 0) & (at < self.num_real)
        found = self.weight[at.where(is_own, 0)]
        return self.group.all_reduce(found.masked_fill(~is_own.unsqueeze(1), 0))


class ParallelLMHead(VocabParallelEmbedding):
    """Scores every token. hidden: [num_seqs, hidden_size] -> logits: [num_seqs, vocab_size]"""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_seqs, hidden_size] -> the logits of this rank's tokens"""
        logits = linear(hidden, self.weight)
        if self.num_real < len(self.weight):
            logits[:, self.num_real :] = -torch.inf
        return logits

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Let the embedding's matrix be this one's, too."""
        self.weight = embedding.weight

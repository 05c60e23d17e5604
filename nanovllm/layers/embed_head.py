"""The two ends of the model: token ids to vectors, vectors to logits."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.small_linear import linear
from nanovllm.layers.layer import Layer


class VocabParallelEmbedding(Layer):
    """Looks up a vector per token. token_ids: [num_tokens] -> [num_tokens, hidden_size]

    Cut by the vocabulary: a GPU holds the vectors of some tokens.
    """

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    """Scores every token. hidden: [num_seqs, hidden_size] -> logits: [num_seqs, vocab_size]"""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.weight)

    def tie(self, embedding: VocabParallelEmbedding) -> None:
        """Let the embedding's matrix be this one's, too."""
        self.weight = embedding.weight

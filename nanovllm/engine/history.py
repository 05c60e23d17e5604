"""What the sequences in the cache have said."""

import torch

from nanovllm.engine.step_inputs import Inputs
from nanovllm.kernels.penalties import PROGRAMS, Penalties


class History:
    """The token in each slot of the cache, and room to count a few sequences' tokens."""

    def __init__(self, kv_cache: torch.Tensor, num_columns: int):
        """kv_cache: [2, layers, blocks, block size, ...]; num_columns: a rank's of the logits."""
        device, int32 = kv_cache.device, torch.int32
        self.tokens = torch.zeros(kv_cache.shape[2:4], dtype=int32, device=device)
        self.counts = torch.zeros((PROGRAMS, num_columns), dtype=int32, device=device)

    def penalties(self, inputs: Inputs) -> Penalties:
        """What the sequences of a step with these inputs have said, and what repeating it costs."""
        names = ("block_tables", "table_rows", "lengths", "prompt_lens")
        costs = ("repetitions", "presences", "frequencies")
        return Penalties(self.tokens, self.counts, *(inputs[name] for name in names + costs))

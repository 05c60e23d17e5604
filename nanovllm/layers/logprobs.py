"""How likely tokens are."""

import torch


def logprobs_of(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each row's token, and the `num_top` likeliest: their ids and log-probabilities, float32.

    logits: [num_rows, vocab_size]; token_ids: [num_rows] int64 -> [num_rows]; [num_rows, num_top]
    int64, the likeliest first; [num_rows, num_top]
    """
    x = logits.float()
    total = x.logsumexp(dim=1, keepdim=True)
    own = x.gather(1, token_ids.clamp(min=0).unsqueeze(1)) - total
    top, ids = x.topk(min(num_top, x.shape[1]), dim=1)
    return own.squeeze(1), ids, top - total

"""How likely tokens are."""

import torch
import torch.nn.functional as F

PART = 128  # columns


def whole_parts(x: torch.Tensor) -> torch.Tensor:
    """With columns of -inf, so many that rows are whole parts, and all lie alike in memory."""
    rest = -x.shape[1] % PART
    return F.pad(x, (0, rest), value=-torch.inf) if rest else x


def likeliest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest numbers of each row, the largest first, and where they stand.

    x: [num_rows, num_columns], count or more -> two of [num_rows, count], the second int64
    """
    if x.shape[1] <= count * PART:
        top, at = x.topk(count, dim=1)
        return top, at
    parts = whole_parts(x).view(len(x), -1, PART)
    best = parts.amax(dim=2).topk(count, dim=1).indices
    some = parts.gather(1, best.unsqueeze(2).expand(-1, -1, PART)).flatten(1)
    top, at = some.topk(count, dim=1)
    return top, best.gather(1, at // PART) * PART + at % PART


def logprobs_of(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
    """Each row's token, and the `num_top` likeliest (or as many as there are).

    logits: [num_rows, vocab_size]; token_ids: [num_rows] int64 -> [num_rows, 1 + 2 * num_top]
    float32: the token's log-probability, those of the likeliest, and which these are.
    """
    x = whole_parts(logits).log_softmax(dim=1, dtype=torch.float32)
    own = x.gather(1, token_ids.clamp(min=0).unsqueeze(1))
    top, ids = likeliest(x, min(num_top, logits.shape[1]))
    return torch.cat([own, top, ids.float()], dim=1)  # a float is exact below 2**24

"""Attention, and the cache of keys and values that it reads."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from nanovllm.utils.context import Context, get_context


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The last tokens of one sequence attend to themselves and to every token before them.

    q: [num_new, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim], and the new
    tokens are the last of these. Heads i * group … (i + 1) * group - 1 of q share key/value head i.
    """
    mask = causal_lower_right(len(q), len(k))  # the last query sees the last key
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """Each sequence's new tokens attend to what its blocks hold.

    q: [num_tokens, num_heads, head_dim] -> the same shape; k_cache, v_cache: [num_blocks,
    block_size, num_kv_heads, head_dim], the new tokens' keys and values already among them.
    """
    outputs = []
    if context.num_decodes > 0:
        outputs.append(decode_attention(q, k_cache, v_cache, context, scale))
    if context.num_decodes < len(context.context_lens):
        outputs.append(prefill_attention(q, k_cache, v_cache, context, scale))
    return torch.cat(outputs)


class Attention(nn.Module):
    """Scaled dot-product attention with grouped query heads."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale
        self.k_cache = self.v_cache = torch.empty(0)  # the model runner sets them

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q: [num_tokens, num_heads, head_dim] -> the same shape"""
        context = get_context()
        store_kvcache(k, v, self.k_cache, self.v_cache, context.slot_mapping)
        return paged_attention(q, self.k_cache, self.v_cache, context, self.scale)


def store_kvcache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write each token's key and value into its slot.

    k, v: [num_tokens, num_kv_heads, head_dim]; k_cache, v_cache: [..., num_kv_heads, head_dim],
    whose leading dimensions, flattened, number the slots; slot_mapping: [num_tokens] int64.
    """
    k_cache.view(-1, *k.shape[1:])[slot_mapping] = k
    v_cache.view(-1, *v.shape[1:])[slot_mapping] = v


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """The sequences that bring several tokens, one at a time."""
    outputs = []
    for i in range(context.num_decodes, len(context.context_lens)):
        start, stop = context.cu_seqlens[i : i + 2]
        k, v = gather_kv(k_cache, v_cache, context.slots(i, i + 1, k_cache.shape[1]))
        outputs.append(causal_attention(q[start:stop], k[0], v[0], scale))
    return torch.cat(outputs)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """The sequences that bring one token each, all at once, padded to the longest context.

    The query heads of a group see the same keys, so they are handed over as the rows of one
    matrix and each key is read once.
    """
    n, (num_heads, head_dim) = context.num_decodes, q.shape[1:]
    k, v = gather_kv(k_cache, v_cache, context.slots(0, n, k_cache.shape[1]))
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [n, num_kv_heads, longest, head_dim]
    q = q[:n].view(n, k.shape[1], -1, head_dim)  # [n, num_kv_heads, group, head_dim]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)
    return out.reshape(n, num_heads, head_dim)


def gather_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that lie in these slots, copied into the order of the text.

    slots: [num_seqs, num_tokens] -> two of [num_seqs, num_tokens, num_kv_heads, head_dim]
    """
    k, v = (cache.flatten(0, 1).index_select(0, slots.flatten()) for cache in (k_cache, v_cache))
    return k.view(*slots.shape, *k.shape[1:]), v.view(*slots.shape, *v.shape[1:])

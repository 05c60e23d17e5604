"""Attention, and the cache of keys and values that it reads."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.utils.context import get_context


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Each token of one sequence attends to itself and to every token before it.

    q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim].
    Heads i * group … (i + 1) * group - 1 of q share key/value head i (Ainslie et al. 2023).
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, num_tokens, dim]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


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
        if context.is_prefill:
            return prefill_attention(q, k, v, context.cu_seqlens, self.scale)
        return decode_attention(
            q, self.k_cache, self.v_cache, context.mask, context.max_context_len, self.scale
        )


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
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


def prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: list[int], scale: float
) -> torch.Tensor:
    """Causal attention within each of several whole prompts that lie one after another."""
    spans = zip(cu_seqlens, cu_seqlens[1:], strict=False)
    return torch.cat([causal_attention(q[a:b], k[a:b], v[a:b], scale) for a, b in spans])


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    mask: torch.Tensor | None,
    max_context_len: int,
    scale: float,
) -> torch.Tensor:
    """The newest token of each sequence attends to all that its row of the cache holds.

    q: [num_seqs, num_heads, head_dim]; k_cache, v_cache: [num_rows, row_len, num_kv_heads,
    head_dim]; mask: [num_seqs, 1, 1, max_context_len]. The query heads of a group see the same
    keys, so they are handed over as the rows of one matrix and each key is read once.
    """
    num_seqs, num_heads, head_dim = q.shape
    k = k_cache[:num_seqs, :max_context_len].transpose(1, 2)  # a view: nothing is copied
    v = v_cache[:num_seqs, :max_context_len].transpose(1, 2)
    q = q.view(num_seqs, k.shape[1], -1, head_dim)  # [num_seqs, num_kv_heads, group, head_dim]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(num_seqs, num_heads, head_dim)

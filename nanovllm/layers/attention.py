"""Attention, and the cache of keys and values that it reads."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.config import Config
from nanovllm.kernels.decode_attention import paged_decode_attention
from nanovllm.kernels.fixed_attention import fixed_attention, fixed_decode
from nanovllm.kernels.fixed_order import order_is_fixed
from nanovllm.kernels.jit import is_interpreted
from nanovllm.kernels.norm_rope_store import norm_rope_store
from nanovllm.kernels.prefill_attention import paged_prefill_attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.context import Context, get_context
from nanovllm.utils.torch_settings import without_cudnn


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """The last tokens of one sequence attend to themselves and to every token before them.

    q: [num_new, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim], and the new
    tokens are the last of these. Heads i * group … (i + 1) * group - 1 of q share key/value head i.
    """
    is_whole = len(q) == len(k)
    mask = None if is_whole else lower_right(len(q), len(k), q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    with without_cudnn(q.device):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_whole, scale=scale, enable_gqa=True
        )
    return out.squeeze(0).transpose(0, 1)


def lower_right(num_new: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """The mask in which the last of `num_new` queries sees the last of `num_tokens` keys."""
    if device.type == "cpu":
        return torch.ones(num_new, num_tokens, dtype=torch.bool).tril(num_tokens - num_new)
    # A GPU's kernels need no matrix for it. Imported late: it brings torch's compiler along,
    # which takes a second to load and wants a writable temporary folder.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_new, num_tokens)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
    backend: str = "torch",
) -> torch.Tensor:
    """Each sequence's new tokens attend to what its blocks hold.

    q: [num_tokens, num_heads, head_dim] -> the same shape; k_cache, v_cache: [num_blocks,
    block_size, num_kv_heads, head_dim], the new tokens' keys and values already among them.
    """
    return BACKENDS[backend](q, k_cache, v_cache, context, scale)


class Attention(nn.Module):
    """Attention with grouped query heads over a cache of its own, from the projection on."""

    def __init__(self, scale: float, q_norm: RMSNorm | None = None, k_norm: RMSNorm | None = None):
        """q_norm, k_norm: what normalises each query and key, where the model has it."""
        super().__init__()
        self.scale = scale
        self.k_cache = self.v_cache = torch.empty(0)  # the model runner sets these three
        self.backend = "torch"
        self.norms: tuple[torch.Tensor | None, torch.Tensor | None, float] = (None, None, 0.0)
        if q_norm and k_norm:  # in a tuple, so that torch does not register them here too
            self.norms = (q_norm.weight, k_norm.weight, q_norm.eps)

    def forward(self, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Normalise, turn and store in one launch, then read.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; rotary: from RotaryEmbedding
        -> [num_tokens, num_heads, head_dim]
        """
        context, k_cache, v_cache = get_context(), self.k_cache, self.v_cache
        q = norm_rope_store(qkv, *self.norms, *rotary, k_cache, v_cache, context.slot_mapping)
        return paged_attention(q, k_cache, v_cache, context, self.scale, self.backend)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """The sequences that bring several tokens, one at a time."""
    outputs, (_, starts) = [], context.lists()
    for i in range(context.num_decodes, len(context.block_tables)):
        start, stop = starts[i : i + 2]
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
    mask = context.decode_mask()
    if mask is not None:  # what is hidden may be another request's, and 0 * NaN is NaN
        hidden = ~mask[:, 0, 0, :, None, None]  # [n, longest, 1, 1]
        k, v = k.masked_fill_(hidden, 0), v.masked_fill_(hidden, 0)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [n, num_kv_heads, longest, head_dim]
    q = q[:n].view(n, k.shape[1], -1, head_dim)  # [n, num_kv_heads, group, head_dim]
    with without_cudnn(q.device):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(n, num_heads, head_dim)


def gather_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that lie in these slots, copied into the order of the text.

    slots: [num_seqs, num_tokens] -> two of [num_seqs, num_tokens, num_kv_heads, head_dim]
    """
    k, v = (cache.flatten(0, 1).index_select(0, slots.flatten()) for cache in (k_cache, v_cache))
    return k.view(*slots.shape, *k.shape[1:]), v.view(*slots.shape, *v.shape[1:])


def torch_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """Decodes and prompts in torch: for a CPU, and to test the kernels by."""
    outputs = []
    if context.num_decodes > 0:
        outputs.append(decode_attention(q, k_cache, v_cache, context, scale))
    if context.num_decodes < len(context.block_tables):
        outputs.append(prefill_attention(q, k_cache, v_cache, context, scale))
    return torch.cat(outputs)


def triton_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """Decodes and prompts by this project's kernels."""
    out, n, tables = torch.empty_like(q), context.num_decodes, context.block_tables
    lens, starts, fixed = context.context_lens, context.cu_seqlens, order_is_fixed()
    if n > 0 and fixed:
        caches, zeros = (k_cache, v_cache), context.counters
        fixed_decode(q, caches, tables[:n], lens, starts, scale, out, zeros)
    elif n > 0:
        paged_decode_attention(
            q, k_cache, v_cache, tables[:n], lens, scale, out,
            order=context.order, counters=context.counters,
        )  # fmt: skip
    if n < len(tables):
        attend = fixed_attention if fixed else paged_prefill_attention
        attend(q, k_cache, v_cache, tables, lens, starts, context.max_new, scale, out, first_seq=n)
    return out


def flash_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    context: Context,
    scale: float,
) -> torch.Tensor:
    """Decodes and prompts by the library flash-attn (Dao 2023)."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    out, n, tables = torch.empty_like(q), context.num_decodes, context.block_tables
    lens, starts = context.context_lens, context.cu_seqlens
    if n > 0:
        settings = dict(softmax_scale=scale, causal=True, block_table=tables[:n])
        out[:n] = flash_attn_with_kvcache(
            q[:n].unsqueeze(1), k_cache, v_cache, cache_seqlens=lens[:n], **settings
        ).squeeze(1)
    if n < len(tables):
        settings = dict(softmax_scale=scale, causal=True, block_table=tables[n:])
        ends = F.pad(lens[n:].cumsum(0, dtype=torch.int32), (1, 0))
        longest = tables.shape[1] * k_cache.shape[1]
        out[n:] = flash_attn_varlen_func(
            q[n:], k_cache, v_cache, starts[n:] - n, ends, context.max_new, longest, **settings
        )
    return out


BACKENDS = {"torch": torch_attention, "triton": triton_attention, "flash_attn": flash_attention}


def choose_backend(config: Config, head_dim: int) -> str:
    """The attention backend that `config` asks for; ValueError where it can't be had.

    "auto" is our kernels on a GPU: flash-attn was nowhere faster by more than the noise.
    """
    name, device = config.attention_backend, config.torch_device
    fits = 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
    if name == "auto":
        return "triton" if device.type == "cuda" and fits else "torch"
    asked = f"attention_backend={name!r}"
    if name != "torch" and device.type != "cuda" and not (name == "triton" and is_interpreted()):
        raise ValueError(f"{asked} needs a GPU, the device is {device}")
    if name == "triton" and not fits:
        raise ValueError(f"{asked} needs a head_dim of 16, 32, 64, 128 or 256, got {head_dim}")
    if name == "flash_attn":
        if importlib.util.find_spec("flash_attn") is None:
            raise ValueError(f"{asked} needs the package flash-attn, which is not installed")
        if config.kvcache_block_size % 256:
            size = config.kvcache_block_size
            raise ValueError(f"{asked} needs a kvcache_block_size of 256 or a multiple, got {size}")
        if config.torch_dtype == torch.float32 or head_dim % 8 or head_dim > 256:
            raise ValueError(
                f"{asked} needs bfloat16 or float16 and a head_dim of at most 256, a multiple of "
                f"8; got {config.torch_dtype} and {head_dim}"
            )
    return name

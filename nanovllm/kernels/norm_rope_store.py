"""From the merged projection to attention: q/k norm, RoPE, and the store into the cache."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.fixed_order import order_is_fixed
from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs
from nanovllm.kernels.store_kvcache import store_kvcache


def norm_rope_store_torch(
    qkv, q_weight, k_weight, eps, positions, cos_sin, k_cache, v_cache, slot_mapping
) -> torch.Tensor:
    """The same as `norm_rope_store` in torch."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    qkv = qkv.view(len(qkv), -1, head_dim)
    q, k, v = qkv.split((qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None:
        q = F.rms_norm(q, (head_dim,), q_weight, eps)
        k = F.rms_norm(k, (head_dim,), k_weight, eps)
    cos, sin = cos_sin[positions].unbind(1)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    store_kvcache(k, v, k_cache, v_cache, slot_mapping)
    return q


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channel i and channel i + head_dim/2 of each head by the angle of its position.

    x: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, 1, head_dim / 2] in float32
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


@triton.jit
def norm_weights(q_weight, k_weight, is_q, at):
    """The weights of channels `at` for rows that are queries or keys."""
    return tl.where(is_q, tl.load(q_weight + at), tl.load(k_weight + at)).to(tl.float32)


@triton.jit
def store_halves(where, x1, x2, mask, HALF: tl.constexpr):
    """The two halves of each row, one behind the other."""
    tl.store(where, x1, mask=mask)
    tl.store(where + HALF, x2, mask=mask)


@triton.jit
def copy_values(
    v_cache, v, slot, first,
    NUM_KV_HEADS: tl.constexpr, HEADS: tl.constexpr, V_ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """A token's values, from key head `first` on, into its slot."""
    row, channel = tl.arange(0, V_ROWS)[:, None], tl.arange(0, DIM)[None, :]
    head = first + row
    value = tl.load(v + head * DIM + channel, mask=row < HEADS)
    where = v_cache + (slot * NUM_KV_HEADS + head) * DIM + channel
    tl.store(where, value, mask=(row < HEADS) & (slot >= 0))


@triton.jit
def rows_of_tile(first, GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Each row's key head, its place in the group (GROUP: the key itself), and if it is there."""
    row = tl.arange(0, ROWS)[:, None]
    return first + row // (GROUP + 1), row % (GROUP + 1), row < HEADS * (GROUP + 1)


@triton.jit
def normalise(x1, x2, weights1, weights2, eps, out, DIM: tl.constexpr):
    """RMSNorm of each row, held as two halves; rounded to the type of `out`, as torch does it."""
    kind = out.dtype.element_ty
    norm = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / DIM + eps)[:, None]
    x1 = (x1 * norm * weights1).to(kind).to(tl.float32)
    return x1, (x2 * norm * weights2).to(kind).to(tl.float32)


@triton.jit
def norm_rope_store_kernel(
    q, qkv, q_weight, k_weight, eps, positions, cos_sin, k_cache, v_cache, slot_mapping,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    V_ROWS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token and HEADS key heads: their queries, keys and values."""
    DIM: tl.constexpr = 2 * HALF
    NUM_HEADS: tl.constexpr = GROUP * NUM_KV_HEADS
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    channel = tl.arange(0, HALF)[None, :]
    kv_head, member, there = rows_of_tile(first, GROUP, HEADS, ROWS)
    is_q, is_k = there & (member < GROUP), there & (member == GROUP)
    head = tl.where(is_q, kv_head * GROUP + member, NUM_HEADS + kv_head)
    if NORM:
        left = tl.zeros([ROWS, HALF], tl.int32) + channel
        weights1 = norm_weights(q_weight, k_weight, is_q, left)
        weights2 = norm_weights(q_weight, k_weight, is_q, left + HALF)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    angle = cos_sin + tl.load(positions + token).to(tl.int64) * DIM + channel
    cos, sin = tl.load(angle), tl.load(angle + HALF)
    wait_for_inputs(PDL)
    heads = qkv + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * DIM
    x = heads + head * DIM + channel
    x1 = tl.load(x, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
    if NORM:
        x1, x2 = normalise(x1, x2, weights1, weights2, eps, q, DIM)
    kind = q.dtype.element_ty
    y1, y2 = (x1 * cos - x2 * sin).to(kind), (x2 * cos + x1 * sin).to(kind)
    store_halves(q + (token * NUM_HEADS + head) * DIM + channel, y1, y2, is_q, HALF)
    where = k_cache + (slot * NUM_KV_HEADS + kv_head) * DIM + channel
    store_halves(where, y1, y2, is_k & (slot >= 0), HALF)
    values = heads + (NUM_HEADS + NUM_KV_HEADS) * DIM
    copy_values(v_cache, values, slot, first, NUM_KV_HEADS, HEADS, V_ROWS, DIM)


FEW_TOKENS = 512


def takes_all_heads(num_tokens: int) -> bool:
    """Does a program take all key heads of a token, or one? With few tokens one: all are busy."""
    return num_tokens > FEW_TOKENS or order_is_fixed()


def norm_rope_store(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Normalise each query and key, turn them by their position, store keys and values.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; q_weight, k_weight:
    [head_dim], or None for no norm; positions, slot_mapping: [num_tokens]; cos_sin: [num_positions,
    2, 1, head_dim / 2] float32; k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
    Returns the queries, [num_tokens, num_heads, head_dim].
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    rest = q_weight, k_weight, eps, positions, cos_sin, k_cache, v_cache, slot_mapping
    if not uses_triton(qkv) or head_dim & (head_dim - 1):
        return norm_rope_store_torch(qkv, *rest)
    num_tokens, num_heads = len(qkv), qkv.shape[1] // head_dim - 2 * num_kv_heads
    q, group = qkv.new_empty((num_tokens, num_heads, head_dim)), num_heads // num_kv_heads
    many, pdl = takes_all_heads(num_tokens), overlaps(qkv)
    heads = num_kv_heads if many else 1  # of a token, for one program
    norm_rope_store_kernel[num_tokens, num_kv_heads // heads](
        q, qkv, *rest, NUM_KV_HEADS=num_kv_heads, GROUP=group, HEADS=heads,
        ROWS=triton.next_power_of_2(heads * (group + 1)), V_ROWS=triton.next_power_of_2(heads),
        HALF=head_dim // 2, NORM=q_weight is not None, PDL=pdl, launch_pdl=pdl,
        num_warps=4 if many else 1,
    )  # fmt: skip
    return q

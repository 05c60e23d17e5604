"""Writing keys and values into their slots of the cache."""

import torch

from nanovllm.kernels.jit import tl, triton, uses_triton


@triton.jit
def store_kernel(
    k, v, k_cache, v_cache, slot_mapping, k_stride, v_stride,
    SIZE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)  # slot * SIZE passes 2**31 in a large cache
    at = tl.arange(0, PADDED)
    there = (at < SIZE) & (slot >= 0)
    key = tl.load(k + token * k_stride + at, mask=there)
    value = tl.load(v + token * v_stride + at, mask=there)
    tl.store(k_cache + slot * SIZE + at, key, mask=there)
    tl.store(v_cache + slot * SIZE + at, value, mask=there)


def store_kvcache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write each token's key and value into its slot; a token whose slot is -1 writes nothing.

    k, v: [num_tokens, num_kv_heads, head_dim], heads and channels contiguous; k_cache, v_cache:
    [num_blocks, block_size, num_kv_heads, head_dim], contiguous; slot_mapping: [num_tokens].
    """
    if not uses_triton(k):
        return store_kvcache_torch(k, v, k_cache, v_cache, slot_mapping)
    size = k.shape[1] * k.shape[2]
    store_kernel[len(k),](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0),
        SIZE=size, PADDED=triton.next_power_of_2(size),
    )  # fmt: skip


def store_kvcache_torch(k, v, k_cache, v_cache, slot_mapping) -> None:
    """The same in torch."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept].long()
    k_cache.view(-1, *k.shape[1:])[slots] = k[kept]
    v_cache.view(-1, *v.shape[1:])[slots] = v[kept]

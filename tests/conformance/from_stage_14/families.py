"""Checkpoints of every other architecture, in at least six shapes each."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import SMALL, save_random


def llama3(**numbers) -> dict:
    """RoPE as in Llama 3.1 and later, trained on 64 positions and stretched to 256."""
    rope = dict(
        rope_theta=1e4,
        rope_type="llama3",
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )
    return {"rope_parameters": rope | numbers}


def mixture(num_experts: int, top: int, size: int = 24, **shape) -> dict:
    """Qwen3-MoE's shape: so many experts of so many channels, of which a token takes `top`."""
    own = dict(num_experts=num_experts, num_experts_per_tok=top, moe_intermediate_size=size)
    return dict(norm_topk_prob=True) | own | shape


UNTIED = dict(tie_word_embeddings=False)
# Heads that fill the hidden size, as older config.json files have it, which state no head_dim.
PLAIN = dict(hidden_size=64, num_attention_heads=4, head_dim=16)
FAMILIES = {
    "Qwen2": {
        "tied": dict(),
        "untied": dict(shape=UNTIED),
        "no head_dim": dict(shape=PLAIN, drop=("head_dim",)),
        "groups of 7": dict(shape=dict(num_attention_heads=7, num_key_value_heads=1)),
        "large base": dict(shape=dict(rope_parameters={"rope_theta": 1e6, "rope_type": "default"})),
        "odd sizes": dict(shape=dict(hidden_size=40, intermediate_size=56, head_dim=24)),
        "sharded": dict(shape=UNTIED, max_shard_size="40KB"),
        "bfloat16 file": dict(dtype=torch.bfloat16),
    },
    "Llama": {
        "tied": dict(),
        "untied": dict(shape=UNTIED),
        "no head_dim": dict(shape=PLAIN, drop=("head_dim",)),
        "as many key heads": dict(shape=dict(num_key_value_heads=4)),
        "groups of 3": dict(
            shape=dict(num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
        ),
        "llama3 RoPE": dict(shape=llama3()),
        "llama3 RoPE, other numbers": dict(
            shape=llama3(factor=32.0, low_freq_factor=2.0, high_freq_factor=3.0) | UNTIED
        ),
        "biases": dict(shape=dict(attention_bias=True, mlp_bias=True)),
        "biases of attention": dict(shape=dict(attention_bias=True) | UNTIED),
        "sharded": dict(shape=UNTIED, max_shard_size="40KB"),
    },
    "Qwen3Moe": {
        "8 experts, 2": dict(shape=mixture(8, 2)),
        "7 experts, 3, untied": dict(shape=mixture(7, 3, **UNTIED)),
        "5 experts, all": dict(shape=mixture(5, 5)),
        "1 expert": dict(shape=mixture(1, 1)),
        "weights that do not add up to 1": dict(shape=mixture(6, 2, norm_topk_prob=False)),
        "odd sizes": dict(shape=mixture(9, 4, 20, hidden_size=40, head_dim=24)),
        "every second layer": dict(shape=mixture(4, 2, decoder_sparse_step=2, num_hidden_layers=3)),
        "one layer without": dict(shape=mixture(4, 2, mlp_only_layers=[0])),
        "biases": dict(shape=mixture(4, 1, attention_bias=True)),
        "sharded": dict(shape=mixture(8, 2, **UNTIED), max_shard_size="40KB"),
    },
}
# One of each for laws that take longer: heads and channels that four ranks can share.
EACH = {
    "Qwen2": dict(UNTIED, num_attention_heads=8, num_key_value_heads=2, vocab_size=318),
    "Llama": dict(
        llama3(), num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    ),
    "Qwen3Moe": mixture(7, 3, mlp_only_layers=[1], num_hidden_layers=3, num_attention_heads=8),
}


def save_family(folder: Path, family: str, name: str) -> Path:
    """A checkpoint of FAMILIES."""
    return save_random(folder, family=family, **FAMILIES[family][name])


def save_each(folder: Path, family: str, **change) -> tuple[Path, int]:
    """The checkpoint of EACH, and the size of its vocabulary."""
    shape = EACH[family] | change
    return save_random(folder, shape, family=family), (SMALL | shape)["vocab_size"]

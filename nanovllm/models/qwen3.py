"""Qwen3 (Qwen Team 2025), dense. Parameter names are those of the Hugging Face checkpoints."""

import torch
from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.kernels.norm_rope_store import norm_rope_store
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.small_linear import is_small, small_linear
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import Embedding, LMHead
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import Linear, MergedLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import get_context

Rotary = tuple[torch.Tensor, torch.Tensor]  # positions, and the table of their angles


class Qwen3Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised per head before RoPE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedLinear(config.hidden_size, parts, bias=config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attn = Attention(scale=config.head_dim**-0.5)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same shape"""
        q = norm_rope_store(
            self.qkv_proj(x),
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            *rotary,
            self.attn.k_cache,
            self.attn.v_cache,
            get_context().slot_mapping,
        )
        return self.o_proj(self.attn.attend(q).flatten(1))


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedLinear(config.hidden_size, parts)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same shape"""
        if is_small(x):
            return self.down_proj(small_linear(x, self.gate_up_proj.weight, silu=True))
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class Qwen3DecoderLayer(nn.Module):
    """Attention, then the MLP, each on a normalised copy and added back to the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Qwen3Attention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, what is to be added to the stream: [num_tokens, hidden_size] -> the next x, stream"""
        x, stream = self.input_layernorm(x, stream)
        x = self.self_attn(x, rotary)
        x, stream = self.post_attention_layernorm(x, stream)
        return self.mlp(x), stream


class Qwen3Model(nn.Module):
    """The stack of layers between the embedding and the logits."""

    def __init__(self, config: ModelConfig, num_positions: int):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            config.max_position_embeddings,
            config.rope_scaling,
            num_positions,
        )
        layers = [Qwen3DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [num_tokens] -> [num_tokens, hidden_size]"""
        x, stream = self.embed_tokens(input_ids), None
        rotary = (positions, self.rotary_emb.cos_sin)
        for layer in self.layers:
            x, stream = layer(x, stream, rotary)
        return self.norm(x, stream)[0]


class Qwen3ForCausalLM(nn.Module):
    """The model as its checkpoints name it: `model.*` and, unless tied, `lm_head.weight`."""

    def __init__(self, config: ModelConfig, num_positions: int):
        super().__init__()
        self.model = Qwen3Model(config, num_positions)
        self.lm_head = LMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [num_tokens] -> hidden states [num_tokens, hidden_size]"""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_seqs, hidden_size] -> logits [num_seqs, vocab_size]"""
        return self.lm_head(hidden)

"""Qwen3 (Qwen Team 2025), dense. Parameter names are those of the Hugging Face checkpoints."""

from collections.abc import Callable

import torch
from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.rotary_embedding import RotaryEmbedding

Rotary = tuple[torch.Tensor, torch.Tensor]  # positions, and the table of their angles


class Qwen3Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised per head before RoPE.

    Other architectures have no norms there, or biases of their own: (of the merged projection, of
    the last one); None for what config.json says of both.
    """

    def __init__(
        self,
        config: ModelConfig,
        has_norms: bool = True,
        biases: tuple[bool, bool] | None = None,
    ):
        super().__init__()
        hidden_size, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv_bias, o_bias = biases or (config.attention_bias, config.attention_bias)
        self.qkv_proj = QKVParallelLinear(hidden_size, head_dim, num_heads, num_kv_heads, qkv_bias)
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, o_bias)
        self.q_norm = RMSNorm(head_dim, eps) if has_norms else None
        self.k_norm = RMSNorm(head_dim, eps) if has_norms else None
        self.attn = Attention(head_dim**-0.5, self.q_norm, self.k_norm)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same shape"""
        return self.o_proj(self.attn(self.qkv_proj(x), rotary).flatten(1))


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, bias: bool = False):
        super().__init__()
        sizes = [config.intermediate_size, config.intermediate_size]
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, sizes, bias)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, bias)
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same shape"""
        return self.down_proj(self.gate_up_proj(x, self.act_fn))


class Qwen3DecoderLayer(nn.Module):
    """Attention, then the MLP, each on a normalised copy and added back to the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = self.make_attention(config)
        self.mlp = self.make_mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def make_attention(self, config: ModelConfig) -> nn.Module:
        """Attention; other architectures have it without norms, or with other biases."""
        return Qwen3Attention(config)

    def make_mlp(self, config: ModelConfig) -> nn.Module:
        """What follows attention; a mixture of experts has another."""
        return Qwen3MLP(config)

    def forward(
        self, x: torch.Tensor, stream: torch.Tensor | None, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, what is to be added to the stream: [num_tokens, hidden_size] -> the next x, stream"""
        x, stream = self.input_layernorm(x, stream)
        x = self.self_attn(x, rotary)
        x, stream = self.post_attention_layernorm(x, stream)
        return self.mlp(x), stream


MakeLayer = Callable[[ModelConfig, int], nn.Module]  # the layer of that number


class Qwen3Model(nn.Module):
    """The stack of layers between the embedding and the logits."""

    def __init__(self, config: ModelConfig, num_positions: int, make_layer: MakeLayer):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryEmbedding(
            config.head_dim,
            config.rope_theta,
            config.max_position_embeddings,
            config.rope_scaling,
            num_positions,
        )
        layers = [make_layer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [num_tokens] -> [num_tokens, hidden_size]"""
        x, stream = self.embed_tokens(input_ids), None
        rotary = self.rotary_emb(positions)
        for layer in self.layers:
            x, stream = layer(x, stream, rotary)
        return self.norm(x, stream)[0]


class Qwen3ForCausalLM(nn.Module):
    """The model as its checkpoints name it: `model.*` and, unless tied, `lm_head.weight`."""

    def __init__(self, config: ModelConfig, num_positions: int):
        super().__init__()
        self.model = Qwen3Model(config, num_positions, self.make_layer)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        """Layer number `index`; other architectures have other layers."""
        return Qwen3DecoderLayer(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [num_tokens] -> hidden states [num_tokens, hidden_size]"""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_seqs, hidden_size] -> logits [num_seqs, vocab_size]"""
        return self.lm_head(hidden)

    packed_modules_mapping = {
        "q_proj": ("qkv_proj", 0),
        "k_proj": ("qkv_proj", 1),
        "v_proj": ("qkv_proj", 2),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }

"""Qwen3 (Qwen Team 2025) with a mixture of experts in place of the MLP."""

import torch
from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.kernels.routing import route
from nanovllm.layers.experts import Experts
from nanovllm.layers.linear import ReplicatedLinear
from nanovllm.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM


class Qwen3MoeMLP(nn.Module):
    """Each token goes to the experts that score highest with it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top, self.norm = config.num_experts_per_tok or 0, config.norm_topk_prob
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts or 0)
        self.experts = Experts(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, hidden_size] -> the same shape"""
        return self.experts(x, *route(self.gate(x), self.top, self.norm))


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with another MLP."""

    def make_mlp(self, config: ModelConfig) -> nn.Module:
        """The mixture."""
        return Qwen3MoeMLP(config)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """A stack in which some layers, as a rule all, have experts."""

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        """Every decoder_sparse_step-th layer has them, but for those of mlp_only_layers."""
        is_sparse = (index + 1) % config.decoder_sparse_step == 0
        is_dense = not is_sparse or index in (config.mlp_only_layers or ())
        return Qwen3DecoderLayer(config) if is_dense else Qwen3MoeDecoderLayer(config)

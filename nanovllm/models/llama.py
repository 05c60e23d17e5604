"""Llama 1 to 3.2 (Grattafiori et al. 2024), and what is built like it: SmolLM2."""

from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3MLP


class LlamaDecoderLayer(Qwen3DecoderLayer):
    """No norms on queries and keys, and biases where config.json says so."""

    def make_attention(self, config: ModelConfig) -> nn.Module:
        """attention_bias is for all four projections."""
        return Qwen3Attention(config, has_norms=False)

    def make_mlp(self, config: ModelConfig) -> nn.Module:
        """mlp_bias is for all three."""
        return Qwen3MLP(config, config.mlp_bias)


class LlamaForCausalLM(Qwen3ForCausalLM):
    """A stack of Llama's layers."""

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        """They are all alike."""
        return LlamaDecoderLayer(config)

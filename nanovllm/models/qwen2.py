"""Qwen2 and Qwen2.5 (Qwen Team 2024)."""

from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3ForCausalLM


class Qwen2DecoderLayer(Qwen3DecoderLayer):
    """Biases on queries, keys and values, and no norms."""

    def make_attention(self, config: ModelConfig) -> nn.Module:
        """Whatever config.json says: in this family the biases are not an option."""
        return Qwen3Attention(config, has_norms=False, biases=(True, False))


class Qwen2ForCausalLM(Qwen3ForCausalLM):
    """A stack of Qwen2's layers."""

    def make_layer(self, config: ModelConfig, index: int) -> nn.Module:
        """They are all alike."""
        return Qwen2DecoderLayer(config)

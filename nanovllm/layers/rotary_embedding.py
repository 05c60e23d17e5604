"""Rotary position embedding, with the linear and YaRN extensions of the context."""

import math

import torch
from torch import nn


def rope_frequencies(
    head_dim: int, theta: float, max_position: int, scaling: dict
) -> tuple[torch.Tensor, float]:
    """Angles per token of each channel pair, [head_dim / 2], and the factor on cos and sin.

    `scaling` is a checkpoint's: rope_type "default", "linear", "yarn" (Peng et al. 2023) or
    "llama3" (Grattafiori et al. 2024). ValueError for any other.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "yarn":
        return yarn_frequencies(frequencies, theta, max_position, scaling)
    if kind == "llama3":
        return llama3_frequencies(frequencies, scaling), 1.0
    raise ValueError(f"rope_type {kind!r} is not supported: default, linear, yarn or llama3")


def llama3_frequencies(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    """As they are for pairs that turn often, divided by the factor for slow ones, and a ramp."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling["factor"] * (1 - keep)


def yarn_frequencies(
    frequencies: torch.Tensor, theta: float, max_position: int, scaling: dict
) -> tuple[torch.Tensor, float]:
    """YaRN: pairs that turn often keep their frequency, slow ones are stretched by the factor."""
    head_dim = 2 * len(frequencies)
    original = scaling.get("original_max_position_embeddings") or max_position
    factor = scaling.get("factor") or max_position / original

    def pair_that_turns(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pair = torch.arange(head_dim // 2, dtype=torch.float32)  # else it would take the default type
    stretch = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = temperature(1.0)
        if mscale and mscale_all:
            attention_factor = temperature(mscale) / temperature(mscale_all)
    return frequencies * (1 - stretch) + frequencies / factor * stretch, attention_factor


class RotaryEmbedding(nn.Module):
    """The table of cosines and sines, one row a position (Su et al. 2021)."""

    def __init__(
        self, head_dim: int, theta: float, max_position: int, scaling: dict, num_positions: int
    ):
        super().__init__()
        frequencies, factor = rope_frequencies(head_dim, theta, max_position, scaling)
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies.to(positions.device))
        # [num_positions, 2, 1, head_dim / 2]: cos and sin of a position lie side by side
        table = torch.stack((angles.cos(), angles.sin()), dim=1).unsqueeze(2) * factor
        self.register_buffer("cos_sin", table, persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [num_tokens] -> the same, and the table in which they are rows"""
        return positions, self.get_buffer("cos_sin")

"""The table of cosines and sines is float32's, whatever type the parameters have."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.layers.rotary_embedding import RotaryEmbedding

HEAD_DIM, THETA, MAX_POSITION, NUM_POSITIONS = 64, 1e6, 40960, 131072
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
SCALINGS = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=4.0),
    "yarn": YARN,
    "yarn, edges not rounded": YARN | dict(truncate=False),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
}
# The largest angle is 131,071 rad, where the numbers of float32 are 1/128 apart: two products
# that round differently are as far apart, and YaRN's factor on the cosine is 1.14.
TOLERANCE = 1.2 / 128


def table(scaling: dict, dtype: torch.dtype) -> torch.Tensor:
    """The table made while torch makes parameters in `dtype`, [num_positions, 2, head_dim / 2]."""
    torch.set_default_dtype(dtype)  # a caller may have set it, for parameters of its own
    try:
        rotary = RotaryEmbedding(HEAD_DIM, THETA, MAX_POSITION, scaling, NUM_POSITIONS)
    finally:
        torch.set_default_dtype(torch.float32)
    return rotary.cos_sin.squeeze(2)


@pytest.mark.parametrize("kind", SCALINGS)
def test_the_table_is_that_of_transformers_at_every_position(kind):
    config = Qwen3Config(
        head_dim=HEAD_DIM,
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITION,
        rope_theta=THETA,
        rope_scaling=dict(SCALINGS[kind]),
    )
    rotary = Qwen3RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(NUM_POSITIONS)[None])
    theirs = torch.stack((cos[0], sin[0]), dim=1)[..., : HEAD_DIM // 2]
    found = table(SCALINGS[kind], torch.float32)
    torch.testing.assert_close(found, theirs, atol=TOLERANCE, rtol=0)
    near = slice(0, 100)  # where an angle has many more digits
    torch.testing.assert_close(found[near], theirs[near], atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SCALINGS)
def test_the_table_does_not_depend_on_the_parameters_type(kind, dtype):
    found = table(SCALINGS[kind], dtype)
    assert found.dtype == torch.float32
    assert torch.equal(found, table(SCALINGS[kind], torch.float32))

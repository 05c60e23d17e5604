"""The engine whose attention, norms and sampling are Triton kernels gives the torch path's tokens.

Here the kernels run in Triton's interpreter, which is slow: a small model, and a few tokens.
"""

from __future__ import annotations

import pytest
from checkpoints import random_prompts, save_random, supported
from device import ON_GPU

from nanovllm import SamplingParams
from nanovllm.kernels.jit import interpreted

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU every test here runs the kernels")
SHARED, *TAILS = random_prompts((16, 2, 9), 64, seed=40)
PROMPTS = [SHARED + TAILS[0], TAILS[1], TAILS[0], SHARED + TAILS[1], SHARED]
STYLES = [
    dict(temperature=0),
    dict(temperature=1.0, seed=1),
    dict(temperature=0.7, seed=2, top_k=20),
    dict(temperature=1.5, seed=3, top_p=0.8),
    dict(temperature=0),
]
PARAMS = [dict(style, max_tokens=n, ignore_eos=True) for style, n in zip(STYLES, (2, 4, 2, 3, 1))]
SHAPE = dict(vocab_size=64, attention_bias=True, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "Qwen3": SHAPE,
    "Qwen2": SHAPE | dict(num_hidden_layers=1),
    "Qwen3Moe": SHAPE
    | dict(num_hidden_layers=1, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24),
}


PLAIN = dict(num_kvcache_blocks=40, kvcache_block_size=16)
CHUNKS = dict(num_kvcache_blocks=6, kvcache_block_size=7, max_num_batched_tokens=5)
ASKED = {"Qwen3": (PLAIN, CHUNKS), "Qwen2": (CHUNKS,), "Qwen3Moe": (CHUNKS,)}


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, options) for family in dict(supported(FAMILIES)) for options in ASKED[family]],
    ids=str,
)
def test_the_kernels_give_the_torch_paths_tokens(family, options, make_llm, tmp_path):
    """A part of the requests comes twice, and finds its beginning in the cache.

    The model has two layers or one, with groups of query heads and biases.
    """
    folder = save_random(tmp_path, FAMILIES[family], family=family)
    calls = [(PROMPTS, PARAMS), (PROMPTS[3:], PARAMS[3:])]

    def served(backend: str) -> tuple[list, int]:
        """The tokens of each call, and of all the cache's hits."""
        llm = make_llm(folder, device="cpu", attention_backend=backend, **options)
        assert llm.model_runner.backend == backend
        found = []
        for prompts, params in calls:
            params = [SamplingParams(**kinds) for kinds in params]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([out["token_ids"] for out in outputs])
        return found, llm.scheduler.block_manager.num_hit_tokens

    expected, hits = served("torch")
    assert expected[0][3:] == expected[1] and hits > 0
    with interpreted():
        assert served("triton") == (expected, hits)

"""The engine whose attention, norms and sampling are Triton kernels gives the torch path's tokens.

Here the kernels run in Triton's interpreter, which is slow: a small model, and a few tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import SMALL, random_prompts, save_random, supported
from device import ON_GPU

import nanovllm
from nanovllm import SamplingParams

pytestmark = pytest.mark.skipif(ON_GPU, reason="on a GPU every test here runs the kernels")
PROGRAM = Path(__file__).with_name("interpreted_engine.py")
SHARED, *TAILS = random_prompts((16, 2, 9), SMALL["vocab_size"], seed=40)
PROMPTS = [SHARED + TAILS[0], TAILS[1], TAILS[0], SHARED + TAILS[1], SHARED]
STYLES = [
    dict(temperature=0),
    dict(temperature=1.0, seed=1),
    dict(temperature=0.7, seed=2, top_k=20),
    dict(temperature=1.5, seed=3, top_p=0.8),
    dict(temperature=0),
]
PARAMS = [dict(style, max_tokens=n, ignore_eos=True) for style, n in zip(STYLES, (4, 6, 2, 3, 1))]


SHAPE = dict(attention_bias=True, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "Qwen3": SHAPE,
    "Qwen2": SHAPE,
    "Qwen3Moe": SHAPE | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24),
}


@pytest.fixture(scope="module", params=supported(FAMILIES), ids=lambda param: param[0])
def folder(request, tmp_path_factory):
    """A random model of two layers, with groups of query heads and biases."""
    family, shape = request.param
    return save_random(tmp_path_factory.mktemp("interpreted"), shape, family=family)


def through_kernels(model: Path, calls: list, **options) -> dict:
    """What the program beside this file answers."""
    asked = dict(model=str(model), options=options, calls=calls)
    package = str(Path(nanovllm.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, PROGRAM],
        input=json.dumps(asked),
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    "options",
    [
        dict(kvcache_block_size=16),
        dict(kvcache_block_size=7),
        dict(kvcache_block_size=7, max_num_batched_tokens=5, num_kvcache_blocks=6),
    ],
    ids=str,
)
def test_the_kernels_give_the_torch_paths_tokens(options, folder, make_llm):
    """A part of the requests comes twice, and finds its beginning in the cache."""
    options = {"num_kvcache_blocks": 40, **options}
    calls = [[PROMPTS, PARAMS], [PROMPTS[3:], PARAMS[3:]]]
    llm = make_llm(folder, device="cpu", attention_backend="torch", **options)
    expected = []
    for prompts, params in calls:
        params = [SamplingParams(**kinds) for kinds in params]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        expected.append([out["token_ids"] for out in outputs])
    assert expected[0][3:] == expected[1]
    found = through_kernels(folder, calls, attention_backend="triton", **options)
    assert found["answers"] == expected
    assert found["backend"] == "triton"
    assert found["hits"] == llm.scheduler.block_manager.num_hit_tokens > 0

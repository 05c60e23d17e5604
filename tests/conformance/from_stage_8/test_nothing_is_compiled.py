"""Once the engine is built no step needs a kernel that was not compiled, whatever it mixes.

Seen through the arguments of each launch, on the CPU; test_gpu.py counts real compilations.
"""

from __future__ import annotations

from random import Random

import pytest
from checkpoints import random_prompts, save_random, supported
from compile_keys import compiling
from device import ON_GPU, offered
from replaying import record

from nanovllm import LLM, SamplingParams
from nanovllm.engine.warmup import two_layers_of_a_kind, warmup_steps
from nanovllm.kernels import decode_attention, norm_rope_store

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="on a GPU test_gpu.py counts"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
VOCAB = 320
FIXED = [fixed] if (fixed := offered(batch_invariant=True)) else []  # where there is the option


SHAPE = dict(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
FAMILIES = {
    "Qwen3": SHAPE,
    "Qwen3Moe": SHAPE | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24),
}


@pytest.fixture(scope="module", params=supported(FAMILIES), ids=lambda param: param[0])
def folder(request, tmp_path_factory):
    """Layers with groups of query heads, and a head that is a matrix of its own."""
    family, shape = request.param
    return save_random(tmp_path_factory.mktemp("keys"), shape, family=family)


def warmed_up(folder, is_recorded: bool, **options) -> LLM:
    """An engine that has done what a GPU's does when it is built."""
    options = {"kvcache_block_size": 16, "max_model_len": 200, "num_kvcache_blocks": 900, **options}
    llm = LLM(folder, device="cpu", attention_backend="triton", **options)
    runner = llm.model_runner
    sizes = runner.max_num_tokens, runner.max_num_seqs, runner.max_model_len, runner.block_size
    with two_layers_of_a_kind(runner.model.model):
        for seqs in warmup_steps(*sizes):
            runner.launch(runner.pack(seqs)).token_ids()
    assert len(runner.model.model.layers) == SHAPE["num_hidden_layers"]
    if is_recorded:
        record(llm, (32, 64))
    return llm


def mixture(random: Random, number: int, longest: int) -> tuple[list, list]:
    """Requests of all lengths; some are filtered, and many end soon, so that others may begin."""
    lengths = [random.choice((1, 1, 2, 3, 9, 15, longest - 9)) for _ in range(number)]
    styles = [dict(temperature=0), dict(temperature=0.9), dict(top_k=5), dict(top_p=0.8, top_k=9)]
    if hasattr(SamplingParams, "repetition_penalty"):
        styles += [
            dict(temperature=0, repetition_penalty=1.2),
            dict(presence_penalty=1, logprobs=2),
        ]
        styles += [dict(prompt_logprobs=0)]
    params = [
        SamplingParams(**random.choice(styles), max_tokens=random.randint(1, 8), ignore_eos=True)
        for _ in range(number)
    ]
    return random_prompts(lengths, VOCAB, seed=random.random()), params


@pytest.mark.parametrize("is_recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float16", dict(max_num_seqs=24, max_num_batched_tokens=160)),
        ("float32", dict(max_num_seqs=24, max_num_batched_tokens=160)),
        ("float16", dict(max_num_seqs=40, max_num_batched_tokens=40)),  # decodes alone are many
        ("float16", dict(max_num_seqs=3, max_num_batched_tokens=7)),
        ("float16", dict(max_num_seqs=5, max_num_batched_tokens=64, max_model_len=24)),
        ("float16", dict(max_num_seqs=1, max_num_batched_tokens=160)),
        ("float16", dict(max_num_seqs=9, max_num_batched_tokens=1)),
        *[
            ("float16", dict(max_num_seqs=24, max_num_batched_tokens=160) | fixed)
            for fixed in FIXED
        ],
    ],
    ids=str,
)
def test_no_step_needs_what_the_warm_up_left_out(monkeypatch, folder, dtype, options, is_recorded):
    """On a GPU so small that attention is run in one piece, in a few parts and in many.

    Three decodes have 16 parts, a number that Triton would compile for if it were allowed to.
    """
    monkeypatch.setattr(decode_attention, "num_processors", lambda device: 48)
    monkeypatch.setattr(norm_rope_store, "FEW_TOKENS", 32)
    random = Random(str(options))
    with compiling() as found:
        llm = warmed_up(folder, is_recorded, dtype=dtype, **options)
        known = set(found)
        found.clear()
        longest, most = llm.max_model_len, llm.model_runner.max_num_seqs
        for number in (1, 2, 3, 5, 7, 13, 2 * most):
            llm.generate(*mixture(random, number, longest), use_tqdm=False)
        llm.generate([[7]] * most, SamplingParams(max_tokens=2), use_tqdm=False)  # all at once
        for length in (2, 16):  # a short prompt by itself
            llm.generate(
                [[8] * min(length, longest - 1)], SamplingParams(max_tokens=1), use_tqdm=False
            )
        llm.exit()
    assert found <= known, f"compiled while serving: {sorted(map(str, found - known))}"
    if not is_recorded:
        assert known <= found, f"compiled for nothing: {sorted(map(str, known - found))}"

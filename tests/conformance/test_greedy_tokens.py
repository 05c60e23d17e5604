"""Greedy tokens equal those of Hugging Face transformers, in float32 on the CPU."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from checkpoints import SMALL, random_prompts, reference_tokens, save_random
from results import results

from nanovllm import SamplingParams
from nanovllm.config import Config

LENGTHS = (1, 2, 7, 33, 100)
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


def rope(**parameters) -> dict:
    """A shape with these `rope_parameters`."""
    return {"rope_parameters": {"rope_theta": 10_000.0, **parameters}}


def yarn(**parameters) -> dict:
    """A shape with YaRN, trained on 32 positions and stretched to 256."""
    return rope(
        **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32} | parameters
    )


FLAT = dict(drop=("rope_parameters",))
OLD_YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}

CHECKPOINTS = {
    "one query head a key head": dict(shape=dict(num_key_value_heads=4)),
    "groups of 2": dict(),
    "groups of 3": dict(shape=dict(num_attention_heads=6)),
    "groups of 8": dict(shape=dict(num_attention_heads=8, num_key_value_heads=1)),
    "untied head": dict(shape=dict(tie_word_embeddings=False)),
    "heads wider than hidden": dict(shape=dict(head_dim=32, num_attention_heads=6)),
    "heads narrower than hidden": dict(shape=dict(head_dim=8)),
    "biases": dict(shape=dict(attention_bias=True)),
    "biases, untied, groups of 4": dict(
        shape=dict(attention_bias=True, tie_word_embeddings=False, num_attention_heads=8)
    ),
    "odd sizes": dict(shape=dict(hidden_size=40, intermediate_size=56, head_dim=24)),
    "one layer": dict(shape=dict(num_hidden_layers=1)),
    "large epsilon": dict(shape=dict(rms_norm_eps=0.1)),
    "rope_parameters": dict(shape=rope(rope_theta=500.0)),
    "flat rope_theta": dict(**FLAT, edit=dict(rope_theta=1e6, rope_scaling=None)),
    "flat rope_theta alone": dict(**FLAT, edit=dict(rope_theta=500)),
    "linear": dict(shape=rope(rope_type="linear", factor=4.0)),
    "linear, old style": dict(
        **FLAT, edit=dict(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    ),
    "yarn": dict(shape=yarn()),
    "yarn, old style": dict(**FLAT, edit=dict(rope_theta=1e4, rope_scaling=OLD_YARN)),
    "yarn, attention_factor": dict(shape=yarn(attention_factor=1.6)),
    "yarn, betas": dict(shape=yarn(beta_fast=1.0, beta_slow=0.25)),
    "yarn, mscale": dict(shape=yarn(mscale=2.0, mscale_all_dim=0.5)),
    "yarn, not truncated": dict(shape=yarn(truncate=False)),
    "yarn, other base": dict(shape=yarn(rope_theta=1e6, factor=4.0)),
    "sharded": dict(max_shard_size="40KB"),
    "float16 file": dict(dtype=torch.float16),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_random_checkpoint_gives_the_tokens_of_transformers(name, tmp_path, make_llm):
    """Alone and in a batch of different lengths, on every kind of Qwen3 checkpoint."""
    folder = save_random(tmp_path, **CHECKPOINTS[name])
    prompts = random_prompts(LENGTHS, SMALL["vocab_size"])
    expected = [reference_tokens(folder, prompt, NUM_TOKENS) for prompt in prompts]
    assert len({t for tokens in expected for t in tokens}) > 10, "a bad fixture: too few tokens"
    llm = make_llm(folder)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [out["token_ids"] for out in outputs] == expected
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
    assert alone == expected
    llm.exit()


def test_sharded_fixture_has_shards(tmp_path):
    """The shard size above is small enough to split the checkpoint."""
    save_random(tmp_path, **CHECKPOINTS["sharded"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


def test_bundled_model_gives_the_tokens_of_transformers(llm, bundled):
    """The story that the book prints is the one that transformers would have written."""
    texts = ["Once upon a time", "One day, Tom and his", "The", "Lily had a red ball. She"]
    prompts = [llm.tokenizer.encode(text) for text in texts] + random_prompts((300,), 1536)
    expected = [reference_tokens(bundled, prompt, 24) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [out["token_ids"] for out in outputs] == expected


def test_second_call_and_shared_prefix_change_nothing(tmp_path, make_llm):
    """What an engine keeps from one request to the next is not to be seen in the tokens."""
    folder = save_random(tmp_path, dict(max_position_embeddings=1024))
    shared, *tails = random_prompts((520, 1, 9, 40), SMALL["vocab_size"])
    prompts = [shared, *(shared + tail for tail in tails), shared[:512], shared[:513]]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = [reference_tokens(folder, prompt, 6) for prompt in prompts]
    llm = make_llm(folder)
    for order in (prompts, prompts, prompts[::-1]):
        outputs = llm.generate(order, params, use_tqdm=False)
        found = {len(p): out["token_ids"] for p, out in zip(order, outputs, strict=True)}
        assert [found[len(prompt)] for prompt in prompts] == expected


# Values that make an engine work in small portions; an option counts where the package has it.
TIGHT = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 24,
    "enforce_eager": True,
}
OFFERED = {spec.name for spec in fields(Config)} & set(TIGHT)
SETTINGS = [{}] + [{name: TIGHT[name]} for name in TIGHT if name in OFFERED]
SETTINGS += [{name: TIGHT[name] for name in TIGHT if name in OFFERED}] if len(OFFERED) > 1 else []


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: ", ".join(o) or "defaults")
def test_tokens_do_not_depend_on_how_the_engine_portions_work(options, random_folder, make_llm):
    """Batch size, chunk size, block size and preemption under pressure change no token."""
    prompts = random_prompts((90, 3, 101, 1, 64, 120, 16, 77), SMALL["vocab_size"], seed=1)
    lengths = (20, 1, 24, 40, 3, 16, 30, 12)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    pairs = list(zip(prompts, lengths, strict=True))
    expected = [reference_tokens(random_folder, prompt, length) for prompt, length in pairs]
    llm = make_llm(random_folder, max_model_len=160, **options)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [out["token_ids"] for out in outputs] == expected
    assert llm.is_finished()
    llm.exit()


def test_longest_sequence_that_the_model_admits(random_folder, make_llm):
    """A prompt and output that fill max_model_len to the last position are right to the end."""
    llm = make_llm(random_folder)
    longest = SMALL["max_position_embeddings"]
    assert llm.max_model_len == longest
    (prompt,) = random_prompts((longest - 8,), SMALL["vocab_size"], seed=2)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    out = llm.generate(prompt, params, use_tqdm=False)[0]
    assert out["token_ids"] == reference_tokens(random_folder, prompt, 8)
    llm.exit()


def test_bfloat16_runs_and_mostly_agrees(make_llm, llm):
    """Half precision may flip a close call, and no more: most first tokens are the same."""
    prompts = random_prompts((20,) * 12, 1536, seed=3)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    half = make_llm(dtype="bfloat16")
    first = [out["token_ids"] for out in half.generate(prompts, params, use_tqdm=False)]
    exact = [out["token_ids"] for out in llm.generate(prompts, params, use_tqdm=False)]
    half.exit()
    assert sum(a == b for a, b in zip(first, exact, strict=True)) >= 9


def test_dummy_weights_need_config_json_alone(tmp_path, make_llm):
    """`load_format="dummy"` runs a shape without weights or tokenizer, the same each time."""
    path = save_random(tmp_path / "whole") / "config.json"
    (tmp_path / "config.json").write_text(path.read_text())
    outputs = []
    for _ in range(2):
        llm = make_llm(tmp_path, load_format="dummy")
        outputs.append(results(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)))
        llm.exit()
    assert outputs[0] == outputs[1]
    assert len(outputs[0][0]["token_ids"]) == NUM_TOKENS

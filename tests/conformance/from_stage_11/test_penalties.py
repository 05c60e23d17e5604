"""Penalties do what their definition says, however a text is computed."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from checkpoints import random_prompts, save_random
from device import ON_GPU, build, offered
from replaying import record, replays
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.jit import interpreted
from nanovllm.layers.sampler import exponential_noise, keep_likely

PROMPTS = random_prompts((3, 40, 1, 17, 40, 9), 320, seed=90)
PROMPTS[4] = PROMPTS[1][:32] + PROMPTS[3][:8]  # a prefix that can be found
KINDS = (
    dict(temperature=0, repetition_penalty=1.5),
    dict(temperature=0, presence_penalty=2.0, frequency_penalty=0.5),
    dict(temperature=0.8, repetition_penalty=1.2, seed=1),
    dict(temperature=1.0, frequency_penalty=2.0, seed=2, top_k=9),
    dict(temperature=0.9, presence_penalty=-2.0, repetition_penalty=0.8, seed=3, top_p=0.8),
    dict(temperature=0),  # asks for nothing, in the same batch
)
PARAMS = [SamplingParams(**kind, max_tokens=16, ignore_eos=True) for kind in KINDS]
WAYS = {
    "one at a time": dict(max_num_seqs=1),
    "a batch": dict(),
    "chunks of 7": dict(max_num_batched_tokens=7),
    "preempted": dict(num_kvcache_blocks=6, enable_prefix_caching=False),
    "chunks, preempted, prefixes": dict(num_kvcache_blocks=6, max_num_batched_tokens=11),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("penalties"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def penalised(logits: list[float], prompt: list[int], completion: list[int], params) -> list[float]:
    """The definition, token by token, in float64."""
    changed = list(logits)
    for token in {*prompt, *completion}:
        x, r = logits[token], params.repetition_penalty
        x = x / r if x > 0 else x * r
        times = completion.count(token)
        changed[token] = (
            x - params.frequency_penalty * times - params.presence_penalty * (times > 0)
        )
    return changed


@torch.inference_mode()
def chosen(model, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
    """The tokens by the definition, and the least margin by which one was the best."""
    token_ids, least = [], math.inf
    for _ in range(params.max_tokens):
        text = prompt + token_ids
        logits = model(torch.tensor([text])).logits[0, -1].double().tolist()
        x = torch.tensor(penalised(logits, prompt, token_ids, params), dtype=torch.float64)
        if params.temperature > 0:
            filters = params.top_k, params.top_p, params.min_p
            x = (x - x.max()) / params.temperature
            x = keep_likely(x[None], *(torch.tensor([value]) for value in filters))[0]
            noise = exponential_noise(
                torch.tensor([params.seed]), torch.tensor([len(text)]), len(x)
            )
            x = x - noise[0].double().log()
        best = x.topk(2).values
        least = min(least, float(best[0] - best[1]))
        token_ids.append(int(x.argmax()))
    return token_ids, least


@pytest.fixture(scope="module")
def expected(model):
    found = [chosen(model, *request) for request in zip(PROMPTS, PARAMS, strict=True)]
    assert min(margin for _, margin in found) > 1e-4, "too close to tell"
    return [token_ids for token_ids, _ in found]


@pytest.mark.parametrize("is_pipelined", [False, True], ids=["read at once", "one step ahead"])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_definition(folder, expected, way, is_pipelined):
    """Twice: the second time with what is in the cache."""
    options = dict(dtype="float32", kvcache_block_size=16, async_scheduling=is_pipelined)
    llm = build(folder, **{"num_kvcache_blocks": 60, **options, **WAYS[way]})
    for _ in range(2):
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected
    if "preempted" in way:
        assert llm.scheduler.num_preemptions > 0
    llm.exit()


def test_the_repetition_penalty_is_that_of_transformers(folder, model):
    prompt, ids = PROMPTS[1], torch.tensor([PROMPTS[1]])
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = model.generate(ids, attention_mask=ids * 0 + 1, repetition_penalty=1.4, **options)
    llm = build(folder, dtype="float32", **offered(kvcache_block_size=16))
    params = SamplingParams(temperature=0, repetition_penalty=1.4, max_tokens=24, ignore_eos=True)
    assert llm.generate([prompt], params, use_tqdm=False)[0]["token_ids"] == (
        theirs[0, len(prompt) :].tolist()
    )
    llm.exit()


def test_one_that_ends_leaves_nothing_to_the_next(folder, expected):
    """Blocks, rows and counts go from request to request."""
    llm = build(folder, dtype="float32", kvcache_block_size=16, num_kvcache_blocks=12)
    for i in (0, 1, 5, 2, 3, 4, 0):
        (output,) = llm.generate([PROMPTS[i]], PARAMS[i], use_tqdm=False)
        assert output["token_ids"] == expected[i]
    llm.exit()


@pytest.mark.skipif(ON_GPU, reason="on a GPU all that is above is replayed")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_replayed_steps_give_the_same(tmp_path):
    """Kernels and recorded steps, padded, mixed steps among them; and the scores with them."""
    shape = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    folder, found = save_random(tmp_path, shape), []
    prompts = random_prompts((3, 9, 1, 20, 5, 2), 64, seed=91)
    params = [replace(p, max_tokens=3 + i % 3, logprobs=i) for i, p in enumerate(PARAMS)]
    options = dict(dtype="float32", device="cpu", kvcache_block_size=16, num_kvcache_blocks=20)
    for backend, context in (("torch", nullcontext), ("triton", interpreted)):
        with context():
            llm = LLM(folder, attention_backend=backend, max_num_seqs=4, **options)
            if backend == "triton":
                record(llm, sizes=(12, 24), most=16, mixed=(24,))
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found.append([output["token_ids"] for output in outputs])
            found.append([list(map(list, output["logprobs"])) for output in outputs])
            if backend == "triton":
                assert len(replays(llm)) > 3
            llm.exit()
    assert found[0] == found[2] and found[1] == found[3]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(repetition_penalty=0),
        dict(repetition_penalty=math.nan),
        dict(presence_penalty=2.5),
        dict(frequency_penalty=-3),
        dict(logprobs=21),
        dict(logprobs=-1),
        dict(prompt_logprobs=True),
    ],
    ids=str,
)
def test_a_misfit_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)

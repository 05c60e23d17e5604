"""How likely each token was: of completions and of prompts, however they are computed."""

from __future__ import annotations

import pytest
import torch
from checkpoints import random_prompts, save_random
from device import build
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams

PROMPTS = random_prompts((3, 40, 1, 17, 40, 9), 320, seed=90)
PROMPTS[4] = PROMPTS[1][:32] + PROMPTS[3][:8]
KINDS = (
    dict(temperature=0, logprobs=3),
    dict(temperature=0.8, seed=1, logprobs=0, prompt_logprobs=2),
    dict(temperature=1.0, seed=2, top_k=5, logprobs=20, repetition_penalty=1.5),
    dict(temperature=0),
    dict(temperature=0, prompt_logprobs=0),
    dict(temperature=1.5, seed=4, prompt_logprobs=20, logprobs=1),
)
PARAMS = [SamplingParams(**kind, max_tokens=9, ignore_eos=True) for kind in KINDS]
WAYS = {
    "one at a time": dict(max_num_seqs=1),
    "a batch": dict(),
    "chunks of 7": dict(max_num_batched_tokens=7),
    "single tokens": dict(max_num_batched_tokens=1, max_num_seqs=1),
    "preempted": dict(num_kvcache_blocks=4, kvcache_block_size=16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("logprobs"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check(told: dict[int, float], expected: torch.Tensor, token: int, count: int) -> None:
    """The token first, then the likeliest ones; expected: [vocab_size]"""
    assert next(iter(told)) == token
    assert told[token] == pytest.approx(float(expected[token]), abs=2e-4)
    values, ids = expected.topk(count)
    assert len(told) == len({token, *ids.tolist()})
    found = sorted(told.items(), key=lambda pair: -pair[1])[:count]
    for (token_id, value), best in zip(found, values.tolist(), strict=True):
        assert value == pytest.approx(best, abs=2e-4)
        assert value == pytest.approx(float(expected[token_id]), abs=2e-4)


@torch.inference_mode()
def check_output(output: dict, prompt: list[int], params: SamplingParams, model) -> None:
    text = prompt + output["token_ids"]
    expected = model(torch.tensor([text])).logits[0].double().log_softmax(-1)
    if params.logprobs is None:
        assert output["logprobs"] is None
    else:
        assert len(output["logprobs"]) == len(output["token_ids"])
        for at, told in enumerate(output["logprobs"], start=len(prompt)):
            check(told, expected[at - 1], text[at], params.logprobs)
    if params.prompt_logprobs is None:
        assert output["prompt_logprobs"] is None
    else:
        first, *others = output["prompt_logprobs"]
        assert first is None and len(others) == len(prompt) - 1
        for at, told in enumerate(others, start=1):
            check(told, expected[at - 1], text[at], params.prompt_logprobs)


@pytest.mark.parametrize("is_pipelined", [False, True], ids=["read at once", "one step ahead"])
@pytest.mark.parametrize("way", WAYS)
def test_they_are_those_of_transformers(folder, model, way, is_pipelined):
    options = dict(dtype="float32", kvcache_block_size=16, async_scheduling=is_pipelined)
    llm = build(folder, **{"num_kvcache_blocks": 60, **options, **WAYS[way]})
    for _ in range(2):  # the second time with what is in the cache
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        for request in zip(outputs, PROMPTS, PARAMS, strict=True):
            check_output(*request, model)
    if way == "preempted":
        assert llm.scheduler.num_preemptions > 0
    llm.exit()


def test_asking_changes_no_token(folder):
    llm = build(folder, dtype="float32", kvcache_block_size=16, num_kvcache_blocks=60)
    for prompt, kind in zip(PROMPTS, KINDS, strict=True):
        quiet = {name: value for name, value in kind.items() if "logprobs" not in name}
        both = [SamplingParams(**given, max_tokens=9, ignore_eos=True) for given in (kind, quiet)]
        loud, silent = llm.generate([prompt] * 2, both, use_tqdm=False)
        assert loud["token_ids"] == silent["token_ids"]
    llm.exit()


def test_the_pieces_of_a_stream_hold_them_token_by_token():
    llm = build(dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=2, prompt_logprobs=1, stop="and")
    whole = llm.generate("Once upon a time", params, use_tqdm=False)[0]
    pieces = list(llm.stream("Once upon a time", params))
    for piece in pieces:
        assert len(piece["logprobs"]) == len(piece["token_ids"])
    joined = [told for piece in pieces for told in piece["logprobs"]]
    assert [list(told) for told in joined] == [list(told) for told in whole["logprobs"]]
    assert len(pieces[-1]["prompt_logprobs"]) == len(whole["prompt_logprobs"])
    llm.exit()


def test_a_preempted_prompt_is_told_once(folder):
    """It is computed twice, the second time from the cache or not."""
    llm = build(folder, dtype="float32", kvcache_block_size=16, num_kvcache_blocks=5)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate([PROMPTS[3], PROMPTS[0], PROMPTS[5]], params, use_tqdm=False)
    assert [len(output["prompt_logprobs"]) for output in outputs] == [17, 3, 9]
    assert llm.scheduler.num_preemptions > 0
    llm.exit()


def test_two_ranks_say_the_same_of_how_likely_tokens_are(tmp_path):
    """With a vocabulary that does not divide: what pads it is never among the likeliest."""
    folder = save_random(tmp_path, dict(vocab_size=319, tie_word_embeddings=False))
    prompts = [[token % 319 for token in prompt] for prompt in PROMPTS]
    params = SamplingParams(
        temperature=0, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2
    )
    found = []
    for size in (1, 2):
        options = dict(kvcache_block_size=16, num_kvcache_blocks=60, max_num_batched_tokens=24)
        llm = LLM(folder, device="cpu", dtype="float32", tensor_parallel_size=size, **options)
        found.append(llm.generate(prompts, params, use_tqdm=False))
        llm.exit()
    for one, two in zip(*found, strict=True):
        for told, other in zip(
            one["logprobs"] + one["prompt_logprobs"][1:],
            two["logprobs"] + two["prompt_logprobs"][1:],
            strict=True,
        ):
            assert other == pytest.approx(told, abs=1e-4)

"""Two GPUs, through NCCL: the tokens of one, and a rank that is lost."""

from __future__ import annotations

import os
import signal
import time
from itertools import zip_longest
from threading import Timer

import pytest
import torch
from device import askable

from nanovllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
PROMPTS = ["Once upon a time", "One day, Tom", "The little fox was sad", "Emma"]
STYLES = [
    dict(temperature=0),
    askable(temperature=0.8, seed=1, logprobs=2),
    dict(top_k=20, seed=2),
    askable(temperature=0, repetition_penalty=1.3, prompt_logprobs=1),
]
PARAMS = [SamplingParams(**STYLES[i], max_tokens=40, ignore_eos=True) for i in range(4)]


def tokens(**options) -> list[list[int]]:
    llm = LLM(dtype="float32", kvcache_block_size=16, **options)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.exit()
    return [out["token_ids"] for out in outputs]


@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("pool", [64, 8])
def test_two_gpus_give_the_tokens_of_a_cpu(enforce_eager, pool):
    options = dict(num_kvcache_blocks=pool, tensor_parallel_size=2, enforce_eager=enforce_eager)
    assert tokens(device="cuda", **options) == tokens(device="cpu", num_kvcache_blocks=64)


def test_two_engines_at_once_each_on_two_gpus():
    options = dict(dtype="float32", kvcache_block_size=16, num_kvcache_blocks=64)
    one, other = (LLM(device="cuda", tensor_parallel_size=2, **options) for _ in range(2))
    assert one.model_runner.group.exchange and other.model_runner.group.exchange
    expected, streams = tokens(device="cpu", num_kvcache_blocks=64), []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        streams += [llm.stream(prompt, params) for llm in (one, other)]
    found: list[list[int]] = [[] for _ in streams]
    for pieces in zip_longest(*streams):
        for ids, piece in zip(found, pieces, strict=True):
            ids += piece["token_ids"] if piece else []
    assert found[::2] == found[1::2] == expected
    one.exit()
    assert [out["token_ids"] for out in other.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
    other.exit()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named(number):
    llm = LLM(device="cuda", tensor_parallel_size=2, gpu_memory_utilization=0.3)
    worker = llm.model_runner.workers.processes[0].pid
    llm.generate("Once", SamplingParams(max_tokens=4), use_tqdm=False)
    start = time.monotonic()
    Timer(0.5, os.kill, (worker, number)).start()
    with pytest.raises(RuntimeError, match="rank 1 was lost"):
        while True:
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert time.monotonic() - start < 12
    llm.exit()
    again = LLM(device="cuda", tensor_parallel_size=2, gpu_memory_utilization=0.3)
    assert again.generate("Once", SamplingParams(max_tokens=4), use_tqdm=False)
    again.exit()

"""On a GPU: recorded steps, the memory that an engine takes, bfloat16, and a long run.

`NANOVLLM_REQUESTS=20000` makes the last of them 20,000 requests instead of 300.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import re
import time
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import random_prompts, reference_model
from device import askable
from in_flight import check_done, check_in_flight
from memory import block_manager, free_ids, greedy, hit_rate

import nanovllm.kernels
from nanovllm import LLM, SamplingParams
from nanovllm.bench import SHAPES
from nanovllm.engine import graphs
from nanovllm.utils.torch_settings import hand_back_memory

pytestmark = pytest.mark.gpu
NUM_REQUESTS = int(os.environ.get("NANOVLLM_REQUESTS", 300))
MODES = {
    "graphs": dict(),
    "no graphs": dict(enforce_eager=True),
    "one by one": dict(async_scheduling=False),
    "neither": dict(enforce_eager=True, async_scheduling=False),
}


@contextmanager
def on_gpu(**options):
    """An engine on the GPU in float32, whose memory is given back."""
    options = {"dtype": "float32", "gpu_memory_utilization": 0.3, **options}
    llm = LLM(device="cuda", **options)
    try:
        yield llm
        check_done(llm)
    finally:
        llm.exit()
        del llm
        free_memory()


def free_memory() -> int:
    """Bytes of the GPU that no process has; an engine that has ended keeps none for later."""
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def tokens(llm: LLM, prompts, params) -> list[list[int]]:
    """The tokens of each request."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [out["token_ids"] for out in outputs]


# ---- Tokens ----


@cache
def requests(number: int) -> tuple[list, list]:
    """Short prompts, and parameters of all kinds, the first of them the same for every number."""
    lengths, random = Random(70), Random(71)
    lengths = tuple(lengths.choice((1, 2, 7, 16, 17, 40)) for _ in range(number))
    styles = [
        dict(temperature=0),
        dict(temperature=0.8),
        dict(temperature=0),
        dict(temperature=1.2, top_k=40),
        dict(temperature=0),
        dict(temperature=1.0, top_p=0.9),
    ]
    params = [
        SamplingParams(
            **styles[i % 6], seed=i, max_tokens=random.choice((1, 3, 8)), ignore_eos=True
        )
        for i in range(number)
    ]
    return random_prompts(lengths, 1536, seed=70), params


@cache
def expected(number: int) -> list[list[int]]:
    """What torch's attention makes of them, each step launched kernel by kernel."""
    with on_gpu(attention_backend="torch", **MODES["neither"]) as llm:
        return tokens(llm, *requests(number))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 16, 17, 33, 100, 512])
def test_graphs_and_pipelining_change_no_token(max_num_seqs, mode):
    """More requests than fit at once, so that batches of every size occur while they end."""
    number = max_num_seqs + max_num_seqs // 4 + 20
    with on_gpu(max_num_seqs=max_num_seqs, **MODES[mode]) as llm:
        found = tokens(llm, *requests(number))
    wrong = [i for i, (a, b) in enumerate(zip(found, expected(number), strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} of {number} requests differ: {wrong[:20]}"


class Counted:
    """A CUDA graph that counts how often it is replayed."""

    def __init__(self, graph):
        self.graph, self.num_replays = graph, 0

    def replay(self) -> None:
        self.num_replays += 1
        self.graph.replay()


def count_replays(llm: LLM) -> dict:
    """For each recorded shape the graph in its place, which counts from now on."""
    for recorded in llm.model_runner.graphs.recorded.values():
        recorded.step = Counted(recorded.step)
    return {shape: recorded.step for shape, recorded in llm.model_runner.graphs.recorded.items()}


def test_steps_are_replayed_where_they_are_recorded():
    """A prompt and then decodes, each of the smallest shape that holds it."""
    with on_gpu(max_num_seqs=40) as llm:
        graphs = count_replays(llm)
        assert max(shape.num_decodes for shape in graphs) == 48
        for number in (1, 3, 5, 40):
            tokens(llm, random_prompts((4,) * number, 1536), greedy(6))
            used = {tuple(shape): graph.num_replays for shape, graph in graphs.items()}
            size = {1: 1, 3: 3, 5: 8, 40: 48}[number]
            assert used[size, size, size] >= 5, used
            for graph in graphs.values():
                graph.num_replays = 0
    with on_gpu(max_num_seqs=40, enforce_eager=True) as llm:
        assert llm.model_runner.graphs.recorded == {}


@pytest.mark.parametrize("max_model_len", [16, 250, 1024])
def test_sequences_may_fill_max_model_len(max_model_len):
    """To the last position, in blocks that it ends in the middle of."""
    ends = (1, 2, 9)
    prompts = random_prompts([max_model_len - n for n in ends] * 2, 1536, seed=72)
    params = [greedy(n) for n in ends * 2]
    found = []
    for options in ({}, MODES["neither"], dict(attention_backend="torch")):
        with on_gpu(max_model_len=max_model_len, kvcache_block_size=48, **options) as llm:
            assert llm.max_model_len == max_model_len
            found.append(tokens(llm, prompts, params))
            with pytest.raises(ValueError, match=f"max_model_len={max_model_len}"):
                llm.add_request(prompts[0], greedy(2))
    assert found[0] == found[1] == found[2]
    assert [len(token_ids) for token_ids in found[0]] == [*ends, *ends]


def test_a_step_that_is_padded_writes_only_its_own_slots(monkeypatch):
    """Five prompts, then five decodes of a graph for eight: bit for bit the rest stays."""
    size = 16
    with on_gpu(
        async_scheduling=False, kvcache_block_size=size, num_kvcache_blocks=64, max_num_seqs=8
    ) as llm:
        runner, shapes = llm.model_runner, []
        shape_for = runner.packer.shape_for

        def watched(step):
            shapes.append(shape_for(step))
            return shapes[-1]

        monkeypatch.setattr(runner.packer, "shape_for", watched)
        generator = torch.Generator("cuda").manual_seed(0)
        runner.kv_cache.normal_(generator=generator)
        for prompt in random_prompts((3, 5, 9, 15, 20), 1536, seed=73):
            llm.add_request(prompt, greedy(8))
        for _ in range(4):
            before = runner.kv_cache.clone()
            seqs = llm.step()
            assert len(seqs) == 5
            own = {
                seq.block_table[at // size] * size + at % size
                for seq in seqs
                for at in range(seq.num_computed_tokens - seq.num_scheduled_tokens, len(seq) - 1)
            }
            changed = (runner.kv_cache != before).flatten(2, 3)  # [2, layers, slots, heads, dim]
            for part in changed.flatten(0, 1):  # of every layer, the keys and the values
                assert set(part.flatten(1).any(1).nonzero().flatten().tolist()) == own
        assert [tuple(shape) for shape in shapes] == [(64, 8, 0)] + [(8, 8, 8)] * 3
        assert set(shapes) <= set(runner.graphs.recorded)
        for seq in seqs:
            llm.abort(seq.seq_id)


# ---- Nothing is compiled, and nothing recorded, once the engine is built ----


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[str]:
    """The kernels that Triton compiles from here on, and it has none to begin with."""
    triton = importlib.import_module("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for info in pkgutil.iter_modules(nanovllm.kernels.__path__):
        module = importlib.import_module(f"{nanovllm.kernels.__name__}.{info.name}")
        for kernel in vars(module).values():
            if isinstance(kernel, triton.runtime.JITFunction):
                kernel.device_caches.clear()
    names = []
    note = lambda *, fn, **_: names.append(fn.name)  # noqa: E731 - None: go on
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    return names


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_step_compiles_a_kernel_or_records_a_graph(compiled, monkeypatch, dtype, mode):
    """Whatever mixes: one token and thousands, decodes by any number, filtered and not."""
    random, (shared,) = Random(77), random_prompts((40,), 1536, seed=77)
    options = dict(dtype=dtype, max_num_seqs=100, max_num_batched_tokens=3000, **MODES[mode])
    with on_gpu(kvcache_block_size=16, num_kvcache_blocks=4000, **options) as llm:
        assert len(set(compiled)) > 5, "or nothing was counted"
        compiled.clear()
        monkeypatch.setattr(graphs, "capture", None)
        longest = llm.max_model_len - 41
        for number in (1, 2, 3, 5, 7, 13, 30, 90, 230):
            asked = [drawn(1000 * number + i, random, shared) for i in range(number)]
            for i in range(0, number, 9):
                length = random.choice((1, 2, 500, longest))
                (prompt,) = random_prompts((min(length, longest),), 1536, seed=i)
                asked[i] = prompt, asked[i][1]
            tokens(llm, *map(list, zip(*asked)))
        assert compiled == []


def test_no_step_takes_long_under_load(compiled, tmp_path):
    """30 seconds of arrivals, 20 in a second: the kernel cache was empty when they began."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-0.6b"]))
    options = dict(model=str(tmp_path), load_format="dummy", dtype="bfloat16")
    random, took = Random(78), []
    with on_gpu(max_num_batched_tokens=4096, **options) as llm:
        compiled.clear()
        arrival = start = time.perf_counter()
        while (now := time.perf_counter()) < start + 30:
            while arrival < now:
                arrival += random.expovariate(20)
                (prompt,) = random_prompts((random.randint(1, 1000),), 150_000, seed=arrival)
                style = random.choice((dict(), dict(temperature=0), dict(top_p=0.9, top_k=50)))
                params = SamplingParams(**style, max_tokens=random.randint(1, 200), ignore_eos=True)
                llm.add_request(prompt, params)
            begin = time.perf_counter()
            if llm.step():
                took.append(time.perf_counter() - begin)
        while not llm.is_finished():
            llm.step()
    assert len(took) > 1000 and compiled == []
    assert max(took) < 0.060, sorted(took)[-5:]


# ---- Memory ----


@pytest.fixture
def wide(tmp_path) -> dict:
    """Options of a model with a vocabulary of 151,936 and two layers, random weights."""
    shape = {**SHAPES["qwen3-0.6b"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return {"model": str(tmp_path), "load_format": "dummy"}


@pytest.mark.parametrize("share", [0.5, 0.3])
@pytest.mark.parametrize("is_wide", [False, True])
def test_an_engine_takes_the_memory_that_it_was_given(share, is_wide, wide):
    """After the largest prompts and the largest batch, filters and all.

    What CUDA holds for the process was there before; the engine leaves room for it.
    """
    before, total = free_memory(), torch.cuda.mem_get_info()[1]
    options = {**wide, "dtype": "bfloat16"} if is_wide else {}
    with on_gpu(gpu_memory_utilization=share, **options) as llm:
        prompts = random_prompts((100,) * 600, 1536, seed=74)
        params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, max_tokens=12)
        for asked in (params, greedy(12)):
            llm.generate(prompts, asked, use_tqdm=False)
        torch.cuda.synchronize()
        used = (before - torch.cuda.mem_get_info()[0]) / total
        assert share - 0.02 < used <= share
    assert before - free_memory() < 0.01 * total, "the memory was not given back"


def test_too_little_memory_is_refused_with_the_numbers():
    before, total = free_memory(), torch.cuda.mem_get_info()[1]
    with pytest.raises(ValueError, match=r"gpu_memory_utilization=0\.001 of") as raised:
        LLM(device="cuda", gpu_memory_utilization=0.001)
    numbers = re.findall(r"(\d+\.\d\d) GiB", str(raised.value))
    assert len(numbers) == 6 and float(numbers[0]) == pytest.approx(total / 2**30, abs=0.01)
    del raised
    hand_back_memory()
    assert before - free_memory() < 0.01 * total
    with on_gpu() as llm:
        assert len(tokens(llm, [[5, 6]], greedy(3))[0]) == 3


def test_engines_one_after_another_have_the_same_room():
    before, sizes, found = free_memory(), [], []
    for _ in range(3):
        with on_gpu() as llm:
            sizes.append(llm.limits.num_blocks)
            found.append(tokens(llm, *requests(20)))
    assert found[0] == found[1] == found[2] == expected(40)[:20]
    assert max(sizes) - min(sizes) <= 0.01 * max(sizes), sizes
    assert before - free_memory() < 0.01 * torch.cuda.mem_get_info()[1]


def test_two_engines_at_once():
    """Each has its own graphs, cache and steps in flight; their steps alternate."""
    prompts, params = requests(20)
    with on_gpu() as one, on_gpu() as other:
        assert one.limits.num_blocks == pytest.approx(other.limits.num_blocks, rel=0.02)
        streams = [llm.stream(p, q) for p, q in zip(prompts, params) for llm in (one, other)]
        found = []
        for pieces in zip(*zip_longest(*streams)):
            found.append([t for piece in pieces if piece for t in piece["token_ids"]])
        assert found[::2] == found[1::2] == expected(40)[:20]
        assert tokens(one, prompts, params) == tokens(other, prompts, params) == found[::2]


# ---- bfloat16 ----


@pytest.mark.parametrize("batch", [1, 12])
def test_bfloat16_logits_are_close_to_the_reference(bundled, monkeypatch, batch):
    """Of recorded prompts and decodes, token by token; where the choice is clear it is the same."""
    texts = random_prompts((3, 8, 20, 5, 31, 2, 11, 7, 25, 14, 9, 40)[:batch], 1536, seed=75)
    options = dict(async_scheduling=False, enable_prefix_caching=False, max_num_seqs=8)
    with on_gpu(dtype="bfloat16", **options) as llm:
        texts[0] = llm.tokenizer.encode("Once upon a time")
        runner, run, logits = llm.model_runner, llm.model_runner.run, {}

        def recording(seqs):
            result, shape = run(seqs), runner.packer.shape_for(seqs)
            with torch.inference_mode():
                rows = runner.model.compute_logits(runner.graphs.recorded[shape].hidden)
            for seq, row in zip(seqs, rows, strict=False):
                logits.setdefault(seq.seq_id, []).append(row.float().cpu())
            return result

        monkeypatch.setattr(runner, "run", recording)
        seqs = [llm.add(llm.make_sequence(text, greedy(24))) for text in texts]
        while not llm.is_finished():
            llm.step()
    model, num_clear = reference_model(bundled), 0
    for seq in seqs:
        with torch.inference_mode():
            right = model(torch.tensor([seq.token_ids[:-1]])).logits[0, seq.num_prompt_tokens - 1 :]
        found = torch.stack(logits[seq.seq_id])
        error = (found - right).abs()
        assert error.mean() < 0.05 and error.max() < 0.5, (error.mean(), error.max())
        best = right.topk(2)
        is_clear = best.values[:, 0] - best.values[:, 1] > 0.5
        chosen = torch.tensor(seq.completion_token_ids)
        assert torch.equal(chosen[is_clear], best.indices[is_clear, 0])
        num_clear += is_clear.sum().item()
    assert num_clear > 6 * batch, "a bad fixture: hardly a choice is clear"


# ---- A long run ----


def resident_bytes() -> int:
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def drawn(number: int, random: Random, shared: list[int]) -> tuple[list[int], SamplingParams]:
    """A request of up to 40 tokens, which may end by a stop token or begin like others."""
    (prompt,) = random_prompts((random.randint(1, 60),), 1536, seed=number)
    style = random.choice(
        (
            dict(temperature=0),
            dict(temperature=0.9),
            dict(temperature=1.1, top_p=0.9),
            dict(temperature=1.0, top_k=random.randint(1, 99)),
            dict(temperature=2.0, stop_token_ids=random.sample(range(1536), 50)),
            dict(temperature=1.0, stop=[random.choice("aeiou")]),
            dict(temperature=0.5, repetition_penalty=1.2, frequency_penalty=random.random()),
            dict(temperature=0, presence_penalty=0.7, logprobs=random.randint(0, 20)),
            dict(temperature=0.6, top_k=20, top_p=0.95, prompt_logprobs=random.randint(0, 3)),
        )
    )
    style = askable(**style)
    prompt = shared[: random.choice((0, 0, 16, 40))] + prompt
    return prompt, SamplingParams(**style, seed=number, max_tokens=random.randint(1, 40))


def test_a_long_run_leaves_nothing_behind():
    """In a small pool; memory is measured whenever a tenth of the requests has been served."""
    random, (shared,) = Random(76), random_prompts((40,), 1536, seed=76)
    options = dict(kvcache_block_size=16, num_kvcache_blocks=40, max_num_seqs=64)
    measured, sample = [], []
    with on_gpu(**options) as llm:
        for tenth in range(10):
            size = NUM_REQUESTS // 10
            left = [drawn(tenth * size + i, random, shared) for i in range(size)]
            sample.append(left[-1])
            seqs = []
            while left or not llm.is_finished():
                while left and len(llm.scheduler.waiting) < 8:
                    seqs.append(llm.add(llm.make_sequence(*left.pop())))
                    if random.random() < 0.05:
                        llm.abort(seqs.pop().seq_id)
                llm.step()
                check_in_flight(llm)
            check_done(llm)
            for seq in seqs:
                assert seq.finish_reason in ("stop", "length")
                assert 1 <= seq.num_completion_tokens <= seq.params.max_tokens
                assert min(seq.token_ids) >= 0
            del seqs, seq
            gc.collect()
            torch.cuda.synchronize()
            measured.append((torch.cuda.memory_allocated(), resident_bytes()))
        assert sorted(free_ids(block_manager(llm))) == list(range(40))
        assert llm.scheduler.num_preemptions > 0 and hit_rate(block_manager(llm)) > 0.05
        together = tokens(llm, *map(list, zip(*sample)))
        assert together == [tokens(llm, *request)[0] for request in sample]
    (gpu, host), (last_gpu, last_host) = measured[0], measured[-1]
    assert abs(last_gpu - gpu) < 2**20, measured
    assert last_host - host < 64 * 2**20, measured

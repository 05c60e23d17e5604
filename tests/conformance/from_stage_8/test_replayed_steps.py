"""Recorded steps, without a GPU: a stand-in replays by running the step again on padded inputs.

The kernels run in Triton's interpreter, which is slow: a small model, few requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice, product

import pytest
import torch
from checkpoints import random_prompts, save_random
from device import ON_GPU, offered
from memory import check_empty, make_seq
from replaying import record, replays

from nanovllm import LLM, SamplingParams
from nanovllm.engine import graphs
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.result import Result
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import Packer, Shape, Step
from nanovllm.kernels.jit import interpreted

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="test_gpu.py replays the graphs of a GPU"),
    # Of the interpreter, which lets numpy say what a GPU keeps to itself.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SIZE = 16  # tokens in a block
TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
PROMPTS = random_prompts((3, 9, 1, 2, 5), TINY["vocab_size"], seed=90)
STYLES = (
    dict(temperature=0),
    dict(temperature=1.0, seed=1),
    dict(temperature=2.0, seed=2, top_k=1),
    dict(temperature=1.5, seed=3, top_p=0.5),
    dict(temperature=0.7, seed=4),
)
PARAMS = [
    SamplingParams(**style, max_tokens=n, ignore_eos=True)
    for style, n in zip(STYLES, (5, 4, 4, 3, 2), strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One layer, one key head for two query heads."""
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    return save_random(tmp_path_factory.mktemp("replayed"), TINY | heads)


@pytest.fixture(scope="module", params=[True, False], ids=["pipelined", "one by one"])
def llm(request, folder):
    """An engine on the CPU whose steps are recorded."""
    options = dict(max_num_seqs=8, num_kvcache_blocks=12, kvcache_block_size=SIZE)
    options |= dict(attention_backend="triton", **offered(async_scheduling=request.param))
    with interpreted():
        llm = LLM(folder, device="cpu", dtype="float32", **options)
        record(llm, sizes=(12, 24), most=8)
        yield llm


def tokens(llm: LLM, prompts, params) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    check_empty(llm)
    return [out["token_ids"] for out in outputs]


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    """The tokens of steps that are launched one by one, with torch's attention."""
    return tokens(LLM(folder, device="cpu", dtype="float32"), PROMPTS, PARAMS)


def test_replays_give_the_tokens_of_steps_that_are_not_recorded(llm, expected):
    """Prompts, then fewer and fewer decodes, which are padded; filtered and not."""
    assert tokens(llm, PROMPTS, PARAMS) == expected
    assert replays(llm) == {(24, 8, 0): 1, (8, 8, 8): 1, (4, 4, 4): 1, (3, 3, 3): 1, (1, 1, 1): 1}


def test_a_short_prompt_is_not_taken_for_decodes(llm, expected):
    """Its three tokens would fit into a recorded step of three sequences."""
    assert tokens(llm, PROMPTS[:1], PARAMS[0]) == expected[:1]
    assert replays(llm) == {(12, 8, 0): 1, (1, 1, 1): 4}


def test_a_filter_holds_after_a_replay(llm):
    """The likeliest token alone is left, however hot; beside it somebody asks for nothing."""
    style = dict(max_tokens=3, ignore_eos=True)
    greedy = SamplingParams(temperature=0, **style)
    first = tokens(llm, PROMPTS[2:], greedy)
    free = SamplingParams(temperature=9.0, seed=5, **style)
    assert tokens(llm, PROMPTS[2:], free) != first, "a bad fixture: nothing to filter"
    top = SamplingParams(temperature=9.0, seed=5, top_k=1, **style)
    replays(llm)
    assert tokens(llm, PROMPTS[2:], [top, greedy, top]) == first
    assert sum(replays(llm).values()) == 3


def slots(seq) -> set[int]:
    """Where a step puts what this sequence brings."""
    first = seq.num_computed_tokens
    places = range(first, first + seq.num_scheduled_tokens)
    return {seq.block_table[at // SIZE] * SIZE + at % SIZE for at in places}


def test_a_padded_replay_writes_only_its_own_slots(llm, monkeypatch):
    """Five prompts, then fewer and fewer decodes: bit for bit the rest of the cache stays."""
    cache, run = llm.model_runner.kv_cache, llm.model_runner.run
    cache.normal_(generator=torch.Generator().manual_seed(0))

    def watched(seqs):
        before, own = cache.clone(), set().union(*map(slots, seqs))
        result = run(seqs)
        changed = (cache != before).flatten(2, 3)  # [2, layers, slots, heads, dim]
        for part in changed.flatten(0, 1):
            assert set(part.flatten(1).any(1).nonzero().flatten().tolist()) == own
        return result

    llm.scheduler.block_manager.reset_prefix_cache()  # or it would find what is no longer there
    monkeypatch.setattr(llm.model_runner, "run", watched)
    replays(llm)
    tokens(llm, PROMPTS, PARAMS)
    assert replays(llm) == {(24, 8, 0): 1, (8, 8, 8): 1, (4, 4, 4): 1, (3, 3, 3): 1, (1, 1, 1): 1}


def shapes(most: int) -> list[Shape]:
    """All small ones: of decodes, of prompts of two tokens or more, of both."""
    found = product(range(most + 1), range(1, most), range(most))
    return [
        Shape(tokens, seqs, decodes)
        for tokens, seqs, decodes in found
        if decodes <= seqs and (tokens - decodes >= 2 * (seqs - decodes))
        if seqs > decodes or tokens == decodes
    ]


def test_what_is_padded_does_what_it_did():
    """A decode has a decode's place, or a prompt's where there is no other kind; none is left."""
    for step, other in product(shapes(7), repeat=2):
        places = other.num_seqs - other.num_decodes, other.num_tokens - other.num_decodes
        rest = step.num_seqs - step.num_decodes, step.num_tokens - step.num_decodes
        side_by_side = step.num_decodes <= other.num_decodes
        side_by_side &= rest[0] <= places[0] and rest[1] <= places[1]
        as_prompts = step.num_seqs <= places[0] and step.num_tokens <= places[1]
        allowed = side_by_side or (as_prompts and other.num_decodes == 0)
        assert step.fits(other) == allowed, (step, other)


def seqs_of(shape: Shape, **params) -> list:
    """As many sequences as a step of this shape has, its decodes first."""
    counts = [1] * shape.num_decodes + [2] * (shape.num_seqs - shape.num_decodes)
    if counts and counts[-1] > 1:
        counts[-1] += shape.num_tokens - sum(counts)
    seqs = [Sequence(i, [*range(9)], SamplingParams(**params), seed=i) for i in range(len(counts))]
    for i, (seq, count) in enumerate(zip(seqs, counts, strict=True)):
        seq.block_table, seq.num_scheduled_tokens = [i], count
    return seqs


def test_a_step_takes_the_smallest_recorded_shape_that_holds_it():
    packer = Packer(SIZE, 2, pin_memory=False)
    packer.shapes = sorted(shapes(5))
    for own in filter(any, shapes(6)):
        holds = [shape for shape in packer.shapes if own.fits(shape)]
        assert packer.shape_for(seqs_of(own)) == min(holds, default=own)


@pytest.mark.parametrize("shape", [(5, 5, 5), (10, 7, 4), (6, 3, 0)], ids=str)
def test_nothing_of_an_earlier_step_is_packed_into_a_later_one(shape):
    """They are laid out in the same place."""
    used, small = Packer(SIZE, 2, pin_memory=False), Shape(1, 1, 1) if shape[2] else Shape(2, 1, 0)
    used.pack(seqs_of(Shape(*shape), temperature=3, top_k=4, min_p=0.5), Shape(*shape))
    for seqs in (seqs_of(small, top_p=0.25), []):
        fresh = Packer(SIZE, 2, pin_memory=False).pack(seqs, Shape(*shape))
        found = used.pack(seqs, Shape(*shape))
        for name, tensor in found.layout.tensors(found.host).items():
            assert torch.equal(tensor, fresh.layout.tensors(fresh.host)[name]), name


def test_a_hot_temperature_stays_finite_on_its_way():
    step = Packer(SIZE, 2, pin_memory=False).pack(seqs_of(Shape(1, 1, 1), temperature=1e300))
    inputs = step.layout.tensors(step.host)
    assert 1e38 < float(inputs["temperatures"]) < math.inf and inputs["top_ps"].tolist() == [1]


def test_prompts_beside_decodes_are_replayed(folder, monkeypatch):
    """One request after the other comes while others decode: with the tokens of each alone."""
    prompts = random_prompts((3, 5, 4, 6, 1), TINY["vocab_size"], seed=91)
    options = dict(max_num_seqs=8, num_kvcache_blocks=12, kvcache_block_size=SIZE)
    monkeypatch.setattr(graphs, "MAX_PROMPTS", 2)
    monkeypatch.setattr(graphs, "MIXED_DECODES", (3,))
    with interpreted():
        llm = LLM(folder, device="cpu", dtype="float32", attention_backend="triton", **options)
        record(llm, sizes=(4,), mixed=(6,))
        streams = [llm.stream(prompt, p) for prompt, p in zip(prompts, PARAMS, strict=True)]
        found = [[] for _ in streams]
        for started in (2, 3, 4, 5, 5, 5, 5, 5, 5):
            for ids, stream in list(zip(found, streams, strict=True))[:started]:
                for piece in islice(stream, 1):
                    ids += piece["token_ids"]
        check_empty(llm)
        assert {(4, 2, 0), (9, 5, 3)} <= replays(llm).keys()
    alone = LLM(folder, device="cpu", dtype="float32")
    expected = [tokens(alone, [x], p)[0] for x, p in zip(prompts, PARAMS, strict=True)]
    assert found == expected


@pytest.mark.parametrize("victim", range(3))
def test_a_row_without_its_tokens_leaves_the_others_in_place(folder, victim):
    """Who is cancelled after a step has listed him has lost the token that was on its way."""
    runner = LLM(folder, device="cpu", dtype="float32", num_kvcache_blocks=4).model_runner
    seqs = [make_seq(prompt + [-1 - row]) for row, prompt in enumerate(PROMPTS[:3])]
    for seq in seqs:
        seq.num_computed_tokens, seq.num_scheduled_tokens = len(seq) - 1, 1
    del seqs[victim].token_ids[-1]
    step = runner.packer.pack(seqs, Shape(4, 4, 4))
    expected = [0 if row == victim else -1 - row for row in range(3)] + [0]
    runner.receive(step)
    assert step.layout.tensors(runner.input_buffer)["input_ids"].tolist() == expected


# ---- What is on its way ----


@dataclass
class Event:
    """A copy that arrives when somebody waits for it."""

    sampled: torch.Tensor
    arrives: torch.Tensor

    @torch.inference_mode()
    def synchronize(self) -> None:
        self.sampled.copy_(self.arrives)


def late(self: ModelRunner, step: Step) -> Result:
    """In the place of `read_sampled`."""
    arrives = self.sampled[: step.num_seqs].clone()
    sampled = torch.full_like(arrives, -1)
    return Result(sampled, Event(sampled, arrives))


def test_tokens_are_read_when_they_are_there(monkeypatch, folder, expected):
    """Where the copy is late, the host waits for it, once a step and no earlier."""
    monkeypatch.setattr(ModelRunner, "read_sampled", late)
    for is_pipelined in (True, False):
        options = offered(async_scheduling=is_pipelined)
        llm = LLM(folder, device="cpu", dtype="float32", **options)
        assert tokens(llm, PROMPTS, PARAMS) == expected

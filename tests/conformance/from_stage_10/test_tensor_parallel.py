"""Several ranks, one engine: the same tokens, whatever is cut where, and the same books."""

from __future__ import annotations

import pytest
import torch
from checkpoints import SMALL, random_prompts, save_random
from device import askable
from memory import check_empty

from nanovllm import LLM, SamplingParams
from nanovllm.config import ModelConfig
from nanovllm.layers.embed_head import VocabParallelEmbedding
from nanovllm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from nanovllm.layers.sampler import (
    SamplingTensors,
    sample_best_torch,
    sample_parts_torch,
    sample_torch,
)
from nanovllm.parallel.group import Group, set_group

# 318 tokens are not four equal parts; two key heads are fewer than four ranks.
SHAPE = dict(
    vocab_size=318,
    num_attention_heads=8,
    num_key_value_heads=2,
    attention_bias=True,
    tie_word_embeddings=False,
)
PROMPTS = random_prompts((3, 40, 1, 17, 40, 9), SHAPE["vocab_size"], seed=120)
PROMPTS[4] = PROMPTS[1][:32] + PROMPTS[3][:8]  # a prefix that can be found
STYLES = (
    dict(temperature=0),
    dict(temperature=0.9, seed=1),
    dict(temperature=1.1, seed=2, top_k=7),
    dict(temperature=0),
    dict(temperature=0.8, seed=3, top_p=0.8),
    askable(temperature=0, repetition_penalty=1.4, frequency_penalty=0.3),
)
PARAMS = [SamplingParams(**style, max_tokens=12, ignore_eos=True) for style in STYLES]
# Chunks, preemptions and two steps in flight.
TIGHT = dict(max_num_batched_tokens=24, num_kvcache_blocks=9, async_scheduling=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("ranks"), SHAPE)


def tokens(folder, size: int, **options) -> list[list[list[int]]]:
    """The tokens of all requests, twice: the second time with what is in the cache."""
    options = {"kvcache_block_size": 16, "num_kvcache_blocks": 60, **options}
    llm = LLM(folder, device="cpu", dtype="float32", tensor_parallel_size=size, **options)
    found = []
    for _ in range(2):
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        check_empty(llm)
        found.append([out["token_ids"] for out in outputs])
    assert (llm.scheduler.num_preemptions > 0) == (options["num_kvcache_blocks"] < 60)
    llm.exit()
    return found


@pytest.fixture(scope="module")
def expected(folder) -> list[list[list[int]]]:
    return tokens(folder, 1)


@pytest.mark.parametrize(("size", "options"), [(2, {}), (2, TIGHT), (4, TIGHT), (8, {})], ids=str)
def test_every_number_of_ranks_gives_the_tokens_of_one(folder, expected, size, options):
    """With biases, a head of its own, a vocabulary that does not divide, and shared key heads."""
    assert tokens(folder, size, **options) == expected


def test_the_bundled_model_on_two_ranks():
    params = SamplingParams(temperature=0, max_tokens=16)
    found = []
    for size in (1, 2):
        llm = LLM(device="cpu", tensor_parallel_size=size, num_kvcache_blocks=8)
        found.append([out["text"] for out in llm.generate(["Once", "Tom"], params, use_tqdm=False)])
        llm.exit()
    assert found[0] == found[1]


def test_a_prompt_longer_than_a_place_of_the_ring(folder):
    """The first steps are small, and this one is not."""
    options = dict(max_model_len=256, kvcache_block_size=16, num_kvcache_blocks=40)
    llm = LLM(folder, device="cpu", dtype="float32", tensor_parallel_size=2, **options)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    alone = LLM(folder, device="cpu", dtype="float32", **options)
    for prompt in ([1], random_prompts((250,), 318, seed=121)[0], [2]):
        found = [engine.generate(prompt, params, False)[0] for engine in (llm, alone)]
        assert found[0]["token_ids"] == found[1]["token_ids"]
    llm.exit()


@pytest.mark.parametrize(
    ("change", "size", "named"),
    [
        (dict(num_attention_heads=6, num_key_value_heads=2), 4, "num_attention_heads, 6"),
        (dict(intermediate_size=90), 4, "intermediate_size, 90"),
        (dict(num_attention_heads=12, num_key_value_heads=3), 4, "num_key_value_heads, 3"),
    ],
)
def test_what_does_not_divide_is_named(change, size, named):
    shape = SMALL | dict(num_attention_heads=8, num_key_value_heads=4, intermediate_size=64)
    with pytest.raises(ValueError, match=f"tensor_parallel_size={size}.*{named}"):
        ModelConfig(**shape | change).shard(size)
    whole = ModelConfig(**shape)
    assert whole.shard(1) == whole


@pytest.mark.parametrize("cuts", [[318], [80, 80, 80, 78], [1] * 6 + [312]], ids=len)
def test_parts_of_the_vocabulary_give_the_token_of_the_whole(cuts):
    """Greedy and hot, with ties, rows of -inf and a NaN."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(64, 318, generator=generator).mul(3).round(decimals=1)
    logits[3, :200] = -torch.inf
    logits[5, 17] = torch.nan
    heat = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(16)
    numbers = torch.arange(64)
    sampling = SamplingTensors(heat, numbers * 77, numbers, all_greedy=False)
    firsts = [sum(cuts[:i]) for i in range(len(cuts))]
    parts = [
        sample_parts_torch(part, sampling, first)
        for part, first in zip(logits.split(cuts, dim=1), firsts, strict=True)
    ]
    joined = tuple(torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    found = sample_best_torch(joined, heat)
    assert found.tolist() == sample_torch(logits, sampling).tolist()
    assert found[5] == -1


LAYERS = {  # each as one of two ranks builds it, and the whole tensors that it takes a part of
    "column": (lambda: ColumnParallelLinear(6, 4), [(8, 6)]),
    "row": (lambda: RowParallelLinear(3, 5), [(5, 6)]),
    "merged": (lambda: MergedColumnParallelLinear(6, [4, 2]), [(8, 6), (4, 6)]),
    "heads": (lambda: QKVParallelLinear(6, 16, 2, 1), [(64, 6), (32, 6), (16, 6)]),
    "vocabulary": (lambda: VocabParallelEmbedding(9, 6), [(9, 6)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_ranks_take_parts_that_make_up_the_whole_and_refuse_other_shapes(name):
    """A tensor with a row or a column too many is handed on whole, which fits nowhere."""
    make, wholes = LAYERS[name]
    for shape in wholes:
        stored, parts = torch.randn(shape), []
        for rank in range(2):
            with set_group(Group(rank, 2)):
                layer = make()
            parts.append(layer.take("weight", stored))
            for more in ((1, 0), (0, 1), (24, 0), (0, 2)):
                wrong = torch.randn(shape[0] + more[0], shape[1] + more[1])
                taken = layer.take("weight", wrong)
                assert taken.shape != parts[-1].shape, (rank, more)
        dim = 1 if name == "row" else 0
        if shape == (16, 6):  # one key head for both
            assert torch.equal(parts[0], stored) and torch.equal(parts[1], stored)
        else:
            assert torch.equal(torch.cat(parts, dim)[: shape[0]], stored)

"""What a filter keeps, who is filtered, what a NaN does, and what a seed decides."""

from __future__ import annotations

import math

import pytest
import torch
from device import ON_GPU, build

from nanovllm import SamplingParams
from nanovllm.layers import sampler
from nanovllm.layers.sampler import Sampler, SamplingTensors, keep_likely, sample_torch

KINDS = [
    dict(temperature=0),
    dict(temperature=1.0, top_k=3),
    dict(temperature=1.0),
    dict(temperature=0, top_k=5, top_p=0.5),
    dict(temperature=1.5, top_p=0.7),
    dict(temperature=0.8, top_k=20, top_p=0.9),
]


def kept(logits: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """The tokens that a filter leaves."""
    scores = torch.tensor([logits])
    left = keep_likely(scores, *(torch.tensor([x]) for x in (top_k, top_p, min_p)))[0]
    return left.isfinite().nonzero().flatten().tolist()


# ---- Filters ----


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_nucleus_ends_as_soon_as_it_has_its_mass(number):
    """Four tokens of a quarter each: halves and quarters are exact in float32."""
    assert len(kept([0.0] * 4, top_p=number / 4)) == number
    assert len(kept([0.0] * 4, top_p=number / 4 - 0.125)) == number


@pytest.mark.parametrize("top_p", [1e-45, 1e-300])
def test_the_likeliest_token_passes_every_filter(top_p):
    """The smaller one is 0 in float32, and then no token has less before it."""
    assert kept([0.0, 2.0, 1.0], top_p=top_p) == [1]
    assert kept([0.0, 2.0, 1.0], top_k=2, top_p=top_p) == [1]


@pytest.mark.parametrize("top_p", [1e-45, 1e-300])
def test_the_smallest_nucleus_is_greedy(llm, top_p):
    params = [SamplingParams(temperature=t, top_p=top_p, seed=1, max_tokens=6) for t in (1.0, 0)]
    drawn, greedy = llm.generate(["Once upon a time"] * 2, params, use_tqdm=False)
    assert drawn["token_ids"] == greedy["token_ids"]


def test_only_the_rows_that_ask_are_filtered(llm, monkeypatch):
    """Each as often as it takes a token, and whoever shares its batch."""
    handed, keep = [], sampler.keep_likely

    def watched(scores, top_ks, top_ps, min_ps):
        handed.extend(zip(top_ks.tolist(), [round(p, 6) for p in top_ps.tolist()], strict=True))
        return keep(scores, top_ks, top_ps, min_ps)

    monkeypatch.setattr(sampler, "keep_likely", watched)
    params = [SamplingParams(**kind, seed=2, max_tokens=5, ignore_eos=True) for kind in KINDS]
    together = llm.generate(["Once upon"] * len(KINDS), params, use_tqdm=False)
    asking = [(p.top_k, p.top_p) for p in params if p.temperature > 0 and (p.top_k or p.top_p < 1)]
    if ON_GPU and hasattr(sampler, "sample_filtered_"):
        asking = []  # a kernel sees who asks
    assert sorted(handed) == sorted(5 * asking)
    handed.clear()
    for output, one in zip(together, params, strict=True):
        alone = llm.generate("Once upon", one, use_tqdm=False)[0]
        assert output["token_ids"] == alone["token_ids"]
    assert sorted(handed) == sorted(5 * asking)


# ---- NaN ----


def sampling(temperature: float, filtered: list[int] | None, n: int) -> SamplingTensors:
    """Parameters of n rows."""
    return SamplingTensors(
        temperatures=torch.full((n,), temperature),
        seeds=torch.arange(n),
        positions=torch.full((n,), 9),
        all_greedy=temperature == 0,
        filters=(torch.full((n,), 4), torch.full((n,), 0.9), torch.zeros(n)),
        filtered=None if filtered is None else torch.tensor(filtered),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "temperature, filtered", [(0.0, None), (1.0, None), (1.0, [1, 2, 4]), (1.0, [0, 1, 2, 3, 4])]
)
@pytest.mark.parametrize("choose", [sample_torch, Sampler()], ids=["function", "module"])
def test_a_row_with_a_nan_has_no_token_and_the_others_have_theirs(
    choose, temperature, filtered, dtype
):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    params = sampling(temperature, filtered, 5)
    clean, broken = choose(logits, params).tolist(), logits.clone()
    broken[1, 0], broken[3, 39], broken[4] = math.nan, math.nan, math.nan
    assert choose(broken, params).tolist() == [clean[0], -1, clean[2], -1, -1]
    assert min(clean) >= 0


@pytest.mark.parametrize("temperature, filtered", [(0.0, None), (1.0, None), (1.0, [0, 1])])
def test_infinite_logits_are_not_nan(temperature, filtered):
    logits = torch.zeros(2, 40)
    logits[0, 7], logits[1] = math.inf, -math.inf
    found = sample_torch(logits, sampling(temperature, filtered, 2)).tolist()
    assert found[0] == 7 and 0 <= found[1] < 40


# ---- Seeds ----


def test_seeds_that_share_a_hash_of_32_bits_give_different_tokens(llm):
    seeds = (3838632592159115872, 2042696449814120761)
    params = [SamplingParams(seed=seed, max_tokens=20, ignore_eos=True) for seed in seeds]
    first, second = llm.generate(["Once upon a time"] * 2, params, use_tqdm=False)
    assert first["token_ids"] != second["token_ids"]


def test_every_bit_of_a_seed_counts(llm):
    seeds = [5] + [5 ^ 1 << bit for bit in range(0, 63, 3)] + [5 - 2**63]
    options = dict(temperature=2.0, max_tokens=20, ignore_eos=True)
    params = [SamplingParams(seed=seed, **options) for seed in seeds]
    outputs = llm.generate(["Once upon a time"] * len(seeds), params, use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == len(seeds)


def test_an_engine_draws_its_seeds_from_more_than_32_bits():
    llm = build(dtype="float32", seed=0)
    for _ in range(4):
        llm.add_request("Once", SamplingParams(max_tokens=1))
    waiting = getattr(llm, "scheduler", llm).waiting
    assert all(seq.seed >> 32 for seq in waiting)
    llm.reset()
    llm.exit()

"""The sampler draws what the logits say, from randomness that has no state."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from nanovllm.layers import sampler
from nanovllm.layers.sampler import Sampler, SamplingTensors, exponential_noise, keep_top_k_top_p


def noise(seed: int, position: int, size: int) -> torch.Tensor:
    return exponential_noise(torch.tensor([seed]), torch.tensor([position]), size)[0]


def sampling(n: int, temperature=1.0, top_k=0, top_p=1.0) -> SamplingTensors:
    """n draws at n positions of one seed."""
    return SamplingTensors(
        temperatures=torch.full((n,), temperature),
        top_ks=torch.full((n,), top_k),
        top_ps=torch.full((n,), top_p),
        seeds=torch.full((n,), 11),
        positions=torch.arange(n),
        all_greedy=temperature == 0,
        any_filtered=top_k > 0 or top_p < 1,
    )


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds"])
def test_noise_is_exponential_along_every_axis(axis):
    n = 200_000
    if axis == "tokens":
        values = noise(3, 7, n)
    else:
        count, fixed = torch.arange(n), torch.full((n,), 5)
        seeds, positions = (count, fixed) if axis == "seeds" else (fixed, count)
        values = exponential_noise(seeds, positions, 1)[:, 0]
    assert (values > 0).all()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in a thousand.
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = (-torch.expm1(-values.double().sort().values) - steps).abs().max()
    assert distance < 1.95 / n**0.5


@pytest.mark.parametrize("bits", [0, 1, sampler.MASK32 - 1, sampler.MASK32])
def test_noise_is_finite_and_positive_for_every_hash(monkeypatch, bits):
    monkeypatch.setattr(sampler, "mix32", lambda x: torch.full_like(x, bits))
    values = noise(3, 7, 10)
    assert values.isfinite().all() and (values > 0).all()


def test_neighbouring_rows_are_independent():
    for other in ((3, 8), (4, 7), (3 + 2**32, 7)):
        pair = torch.stack([noise(3, 7, 100_000), noise(*other, 100_000)])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.015


def test_noise_repeats_and_ignores_the_batch():
    seeds, positions = torch.tensor([1, 2**61, 3]), torch.tensor([0, 5, 9])
    batch = exponential_noise(seeds, positions, 50)
    for row, seed, position in zip(batch, seeds, positions, strict=True):
        assert torch.equal(row, noise(int(seed), int(position), 50))


@pytest.mark.parametrize(
    "change",
    [dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.7), dict(top_k=4, top_p=0.8)],
)
def test_sampled_frequencies_match_the_distribution(change):
    n, logits = 100_000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5])
    chosen = Sampler()(logits.repeat(n, 1), sampling(n, **change))
    scores = logits / change.get("temperature", 1.0)
    if "top_k" in change:
        scores = TopKLogitsWarper(change["top_k"])(None, scores[None])[0]
    if "top_p" in change:
        scores = TopPLogitsWarper(change["top_p"])(None, scores[None])[0]
    expected = scores.softmax(dim=-1)
    found = torch.bincount(chosen, minlength=6) / n
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()


@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_filter_keeps_what_transformers_keeps(top_k, top_p):
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(top_k))
    expected = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = keep_top_k_top_p(logits, torch.full((8,), top_k), torch.full((8,), top_p))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [1e-40, 1e-38, 1e-6, 1e6])
def test_extreme_temperatures_draw_real_tokens(temperature):
    logits = torch.randn(64, 50)
    chosen = Sampler()(logits, sampling(64, temperature=temperature, top_p=0.99))
    assert ((chosen >= 0) & (chosen < 50)).all()
    if temperature < 1:
        assert torch.equal(chosen, logits.argmax(dim=-1))


def test_a_large_batch_is_filtered_part_by_part_to_the_same_tokens(monkeypatch):
    n = 2 * sampler.ROWS + 3
    logits, params = torch.randn(n, 200), sampling(n, temperature=0.9, top_k=20, top_p=0.8)
    params.temperatures[::5], params.top_ks[::3] = 0, 0
    in_parts = Sampler()(logits, params)
    monkeypatch.setattr(sampler, "ROWS", n)
    assert torch.equal(in_parts, Sampler()(logits, params))

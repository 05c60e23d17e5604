"""The sampler draws what the logits say, from randomness that has no state."""

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanovllm.layers import sampler
from nanovllm.layers.sampler import (
    MASK32,
    Sampler,
    SamplingTensors,
    exponential_noise,
    keep_likely,
    key_words,
    mix32,
)

GOLDEN = 0x9E3779B9
BITS = 1 << torch.arange(64)  # each has one bit; the last is -(2**63)


def anywhere(n: int, seed: int = 0) -> torch.Tensor:
    """n seeds that may be any 64-bit number."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.randint(0, 2**32, (2, n), generator=generator)
    return high << 32 | low


def noise(seed: int, position: int, size: int) -> torch.Tensor:
    return exponential_noise(torch.tensor([seed]), torch.tensor([position]), size)[0]


def sampling(n: int, temperature=1.0, top_k=0, top_p=1.0) -> SamplingTensors:
    """n draws at n positions of one seed."""
    return SamplingTensors(
        temperatures=torch.full((n,), temperature),
        filters=(torch.full((n,), top_k), torch.full((n,), top_p), torch.zeros(n)),
        seeds=torch.full((n,), 11),
        positions=torch.arange(n),
        all_greedy=temperature == 0,
        filtered=torch.arange(n) if top_k > 0 or top_p < 1 else None,
    )


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds", "high halves of seeds"])
def test_noise_is_exponential_along_every_axis(axis):
    n = 200_000
    if axis == "tokens":
        values = noise(3, 7, n)
    else:
        count, fixed = torch.arange(n), torch.full((n,), 5)
        seeds = {"positions": fixed, "seeds": count}.get(axis, count << 32)
        positions = count if axis == "positions" else fixed
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


def unmix32(x: torch.Tensor) -> torch.Tensor:
    """What `mix32` made x of."""
    x = ((x ^ (x >> 16)) * pow(0x846CA68B, -1, 2**32)) & MASK32
    x = ((x ^ (x >> 15) ^ (x >> 30)) * pow(0x7FEB352D, -1, 2**32)) & MASK32
    return x ^ (x >> 16)


def seeds_of(a: torch.Tensor, b: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The seeds whose key words at these positions are a and b."""
    a = (unmix32(a) - b) & MASK32
    high = (unmix32(b) - a - positions) & MASK32
    return high << 32 | (unmix32(a) - mix32(positions)) & MASK32


def test_each_of_the_seeds_has_key_words_of_its_own():
    """The words tell the whole seed, all of its 64 bits."""
    seeds = torch.cat([anywhere(100_000), BITS, ~BITS, torch.arange(-1000, 1000)])
    positions = torch.randint(0, 2**20, seeds.shape, generator=torch.Generator().manual_seed(1))
    a, b = key_words(seeds, positions)
    assert ((a | b) >> 32).eq(0).all()
    assert torch.equal(seeds_of(a, b, positions), seeds)


def test_small_seeds_share_no_key_words_at_any_position():
    seeds, positions = torch.cartesian_prod(torch.arange(-20, 20), torch.arange(40_000)).unbind(1)
    a, b = key_words(seeds, positions)
    assert (a << 32 | b).unique().numel() == seeds.numel()


@pytest.mark.parametrize("kind", ["any", "small", "equal low halves"])
def test_a_million_seeds_have_a_million_rows(kind):
    n = 1_000_000
    count = torch.arange(n)
    seeds = {"any": anywhere(n), "small": count, "equal low halves": count << 32}[kind]
    rows = exponential_noise(seeds, torch.full((n,), 7), 4)  # 24 bits or more in each column
    words = rows.view(torch.int32).long()
    first, second = words[:, 0] << 32 | words[:, 1], words[:, 2] << 32 | words[:, 3]
    assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == n


def test_no_row_is_a_part_of_another():
    """Three numbers that follow each other in a row occur nowhere else: nothing is shifted."""
    words = exponential_noise(anywhere(4096), torch.full((4096,), 7), 2048)
    words = words.view(torch.int32).long()
    windows = mixed(mixed(words[:, :-2]) + words[:, 1:-1]) + words[:, 2:]
    assert windows.unique().numel() == windows.numel()


def mixed(x: torch.Tensor) -> torch.Tensor:
    """A hash of 64 bits."""
    x = (x ^ (x >> 31)) * 0x5851F42D4C957F2D
    return (x ^ (x >> 29)) * 0x14057B7EF767814F


def dependence(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """How far two rows are from independent, each in standard deviations.

    By the counts of 16 × 16 classes, and by the largest correlation of all shifts of one row.
    """
    n = len(first)
    x, y = (-torch.expm1(-row.double()) for row in (first, second))  # uniform
    classes = (x * 16).long().clamp(max=15) * 16 + (y * 16).long().clamp(max=15)
    chi_square = ((torch.bincount(classes, minlength=256) - n / 256) ** 2).sum() / (n / 256)
    x, y = ((u - 0.5) * 12**0.5 for u in (x, y))
    shifted = torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(y).conj(), n=n)
    return float(chi_square - 255) / 510**0.5, float(shifted.abs().max()) / n**0.5


def related() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of rows that are close to each other in some way: their seeds and positions."""
    seed, place = anywhere(1, seed=5), torch.tensor([1000])
    a, b = key_words(seed, place)
    low, one = BITS[:32], torch.ones(64, dtype=torch.int64)
    steps = torch.tensor([1, 2, 3, 1000, -1, GOLDEN, -GOLDEN, 5 * GOLDEN])

    def words(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return seeds_of(*torch.broadcast_tensors(a & MASK32, b & MASK32), place)

    return {
        "one bit of the seed": (seed ^ BITS, place * one),
        "one bit of a small seed": (3 ^ BITS, place * one),
        "equal low halves": (seed + (anywhere(64) >> 32 << 32), place * one),
        "equal high halves": (seed ^ (anywhere(64) & MASK32), place * one),
        "neighbouring positions": (seed * one, place + torch.arange(-32, 32)),
        "equal first words": (words(a, b ^ low), place.expand(32)),
        "equal second words": (words(a ^ low, b), place.expand(32)),
        "first words a step apart": (words(a + steps, b), place.expand(8)),
        "second words a step apart": (words(a, b + steps), place.expand(8)),
    }


@pytest.mark.parametrize("kind", related())
def test_related_rows_are_independent(kind):
    """By chance a pair is 7 standard deviations off less than once in a million."""
    seeds, positions = related()[kind]
    rows = exponential_noise(seeds, positions, 2**16)
    base = 3 if "small" in kind else int(anywhere(1, seed=5))
    own = noise(base, 1000, 2**16)
    for seed, position, row in zip(seeds.tolist(), positions.tolist(), rows, strict=True):
        if (seed, position) != (base, 1000):
            assert max(dependence(own, row)) < 7, (seed, position)


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
    found = keep_likely(logits, torch.full((8,), top_k), torch.full((8,), top_p), torch.zeros(8))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(min_p):
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(8, dtype=torch.int64), torch.ones(8)
    found = keep_likely(logits, *none, torch.full((8,), min_p))
    assert torch.equal(found, MinPLogitsWarper(min_p)(None, logits))


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
    params.temperatures[::5], params.filters[0][::3] = 0, 0
    params.filtered = params.temperatures.nonzero().flatten()
    seen, keep = [], sampler.keep_likely

    def counted(scores, *rest):
        seen.append(len(scores))
        return keep(scores, *rest)

    monkeypatch.setattr(sampler, "keep_likely", counted)
    in_parts = Sampler()(logits, params)
    assert max(seen) <= sampler.ROWS and sum(seen) == len(params.filtered)
    monkeypatch.setattr(sampler, "ROWS", n)
    assert torch.equal(in_parts, Sampler()(logits, params))

"""Every kernel computes what its torch twin does, writes all that it should and nothing else.

Inputs are drawn anew in each run; NANOVLLM_KERNEL_SEED repeats those of a run that failed.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
from exact_dot import exact_dot, use_exact_dots
from kernel_cases import (
    DEV,
    DTYPES,
    ON_GPU,
    SEED,
    PagedBatch,
    bits,
    cache_and_copy,
    check,
    check_stored,
    decode,
    draw,
    exact,
    guarded,
    kernels,
    padded,
    prefill,
    randn,
    some_slots,
    wide_integers,
)
from torch import Tensor

from nanovllm.kernels import (
    candidates,
    grouped_linear,
    jit,
    penalties,
    prefill_attention,
    prefill_hopper,
)
from nanovllm.kernels import fixed_attention as fixed_attention_module
from nanovllm.kernels import small_linear as small_linear_module
from nanovllm.kernels.add_rms_norm import add_rms_norm, add_rms_norm_torch
from nanovllm.kernels.all_reduce import all_reduce
from nanovllm.kernels.candidates import sample_filtered_
from nanovllm.kernels.decode_attention import paged_decode_attention
from nanovllm.kernels.fixed_attention import fixed_attention, fixed_decode
from nanovllm.kernels.fixed_order import fixed_order
from nanovllm.kernels.grouped_linear import run_experts, run_experts_torch
from nanovllm.kernels.logprobs import logprobs_of, logprobs_torch
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.penalties import Penalties, penalise_, penalise_torch_
from nanovllm.kernels.prefill_attention import paged_prefill_attention
from nanovllm.kernels.resolve_tokens import resolve_tokens
from nanovllm.kernels.routing import plan, route
from nanovllm.kernels.sample import sample, sample_best, sample_parts
from nanovllm.kernels.silu_and_mul import silu_and_mul, silu_and_mul_torch
from nanovllm.kernels.small_linear import is_small, linear, small_linear
from nanovllm.kernels.store_kvcache import store_kvcache
from nanovllm.layers.attention import paged_attention
from nanovllm.layers.sampler import (
    SamplingTensors,
    exponential_noise,
    keep_likely,
    sample_torch,
)

# Of the interpreter, which lets numpy say what a GPU keeps to itself.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    """Each test draws its own; the seed is shown where one fails."""
    print(f"NANOVLLM_KERNEL_SEED={SEED}")
    torch.manual_seed(SEED)


# Where kernels run


def test_interpreting_without_the_variable_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = "from nanovllm.kernels import jit\nwith jit.interpreted(): pass"
    command, folder = [sys.executable, "-c", code], Path(jit.__file__).parents[2]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert shown.returncode == 1 and "RuntimeError: set TRITON_INTERPRET=1" in shown.stderr


def test_kernels_run_where_they_are_told_to():
    x = torch.zeros(1, device=DEV)
    assert jit.uses_triton(x) == ON_GPU
    with kernels():
        assert jit.uses_triton(x)
        with kernels():
            assert jit.uses_triton(x)
        assert jit.uses_triton(x)
    assert jit.uses_triton(x) == ON_GPU


# Element by element


@each_dtype
@pytest.mark.parametrize("add", [True, False], ids=["add", "first"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (3, 128), (4, 1000), (2, 2048)])
def test_add_rms_norm(shape, add, dtype):
    x, residual = (randn(*shape, dtype=dtype) for _ in range(2))
    weight = randn(shape[1], dtype=dtype)
    before = x.clone(), residual.clone()
    with kernels():
        found, total = add_rms_norm(x, residual if add else None, weight, 0.1)
    check(
        found, add_rms_norm_torch(*exact(x + residual if add else x), None, *exact(weight), 0.1)[0]
    )
    assert torch.equal(total, before[0] + before[1] if add else before[0])
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@each_dtype
@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("ranks, size", [(2, 1), (2, 1000), (2, 1024), (3, 96), (8, 96)])
def test_all_reduce(ranks, size, tags, dtype):
    """Ranks one after the other: a first round waits for nobody and only writes to the others."""
    rows, size_bytes = 5, 8 * size + 4  # with tags, or numbers and a flag
    inboxes = [
        torch.zeros(2 * ranks * rows * size_bytes, dtype=torch.uint8, device=DEV)
        for _ in range(ranks)
    ]
    addresses = torch.tensor([inbox.data_ptr() for inbox in inboxes], device=DEV)
    counts = torch.zeros(ranks, rows, dtype=torch.int32, device=DEV) + 2**16 - 3  # tags wrap
    wait, go = torch.zeros(2, 1, dtype=torch.int32, device=DEV) + torch.tensor([[0], [1]]).to(DEV)
    for num_rows in (3, 5, 1, 4, 5, 2):
        x, residual = randn(ranks, num_rows, size, dtype=dtype), randn(num_rows, size, dtype=dtype)
        weight, before = randn(size, dtype=dtype), counts.clone()
        with kernels():
            for rank in range(ranks):
                all_reduce(x[rank], addresses, counts[rank].clone(), go, rank, tags)
            found = [
                all_reduce(
                    x[rank], addresses, counts[rank], wait, rank, tags, residual, weight, 0.1
                )
                for rank in range(ranks)
            ]
        total = sum(part for part in x.float()).to(dtype) + residual
        for normed, stream in found:
            assert torch.equal(stream, found[0][1]) and torch.equal(normed, found[0][0])
            check(stream, total.double().cpu())
            check(normed, add_rms_norm_torch(*exact(stream), None, *exact(weight), 0.1)[0])
        assert torch.equal(counts[:, :num_rows], before[:, :num_rows] + 1)
        assert torch.equal(counts[:, num_rows:], before[:, num_rows:])


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 96), (5, 1000), (3, 1024), (2, 1025), (2, 2049)])
def test_silu_and_mul(shape, dtype):
    gate_up = randn(shape[0], 2 * shape[1], dtype=dtype, scale=3.0)
    with kernels():
        found = silu_and_mul(gate_up)
    check(found, silu_and_mul_torch(*exact(gate_up)))


def test_silu_of_large_numbers():
    """silu(x) is x for large x and 0 for large -x, with no inf on the way."""
    x = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4] + [2.0] * 7])
    with kernels():
        found = silu_and_mul(guarded(x))
    torch.testing.assert_close(found.cpu(), silu_and_mul_torch(x), rtol=1e-6, atol=1e-30)


SIZES = [(1, 1), (8, 16), (13, 96), (131, 1000), (7, 5000), (3, 18_000)]


@each_dtype
@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize("rows, size", SIZES)
@pytest.mark.parametrize("has_counters", [False, True], ids=["whole", "split"])
def test_small_linear(rows, size, num_tokens, silu, has_counters, dtype):
    """A sum is measured by the size of its addends too: these may cancel out."""
    counters = torch.zeros(2 * rows, dtype=torch.int32, device=DEV)
    x, scale = randn(num_tokens, size, dtype=dtype), 1.0 if not silu else size**-0.5
    weight = randn(rows * (2 if silu else 1), size, dtype=dtype, scale=scale)
    with kernels():
        if not is_small(x, weight):
            assert dtype == torch.float32 and num_tokens > 3
            return
        found = small_linear(x, weight, silu, counters if has_counters else None)
    assert not counters.any()
    measure = 2.0 if silu else size**0.5
    expected = torch.nn.functional.linear(*exact(x, weight))
    expected = silu_and_mul_torch(expected) if silu else expected
    check(padded(found, measure), padded(expected, measure), factor=3 if silu else 1)


@pytest.mark.parametrize("num_tokens", [2, 3])
def test_a_heavy_matrix_is_taken_token_by_token(num_tokens, monkeypatch):
    monkeypatch.setattr(small_linear_module, "LIGHT", 12 * 96)
    x, weight = (randn(n, 96, dtype=DTYPES[1]) for n in (num_tokens, 13))
    with kernels():
        check(linear(x, weight), torch.nn.functional.linear(*exact(x, weight)), factor=96)
        assert not is_small(randn(4, 96, dtype=DTYPES[1]), weight)


@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [96, 2100])
def test_linear_of_any_number_of_tokens(size, has_bias, num_tokens, dtype):
    """With counters too, where the columns of a wide matrix are split and the bias counts once."""
    shapes = (num_tokens, size), (13, size), (13,)
    x, weight, bias = (randn(*shape, dtype=dtype) for shape in shapes)
    bias, counters = bias if has_bias else None, torch.zeros(1, dtype=torch.int32, device=DEV)
    expected = torch.nn.functional.linear(*exact(x, weight), *exact(bias) if has_bias else ())
    for given in (None, counters):
        with kernels():
            found = linear(x, weight, bias, given)
        check(padded(found, size**0.5), padded(expected, size**0.5), factor=3)


# Experts


@each_dtype
@pytest.mark.parametrize("norm", [False, True], ids=["softmax", "normalised"])
@pytest.mark.parametrize("num_experts, top", [(1, 1), (5, 2), (8, 8), (60, 4), (128, 8)])
def test_route(num_experts, top, norm, dtype):
    """The likeliest experts in order, each once, and the weights of those that were chosen."""
    logits = randn(33, num_experts, dtype=dtype, scale=2.0)
    with kernels():
        experts, weights = route(logits, top, norm)
    (exact_logits,) = exact(logits)
    shares = exact_logits.softmax(-1)
    best = shares.topk(top).values
    chosen = shares.gather(1, experts.cpu().long())
    assert torch.allclose(chosen, best, rtol=1e-6)
    assert all(len(set(row)) == top for row in experts.tolist())
    check(weights, chosen / chosen.sum(-1, keepdim=True) if norm else chosen)


def test_route_takes_the_first_of_equals_and_keeps_a_nan_to_its_row():
    logits = torch.zeros(3, 6, device=DEV)
    logits[1, 2] = torch.nan
    with kernels():
        experts, weights = route(logits, 3, True)
    assert experts[0].tolist() == experts[2].tolist() == [0, 1, 2]
    assert weights[1].isnan().all() and torch.equal(
        weights[[0, 2]], weights.new_full((2, 3), 1 / 3)
    )
    assert ((experts >= 0) & (experts < 6)).all()


@pytest.mark.parametrize("num_tokens", [1, 7, 300, 700])
@pytest.mark.parametrize("num_experts, top", [(1, 1), (5, 2), (128, 8)])
def test_plan(num_experts, top, num_tokens):
    """A stable order by experts; some get no pair at all."""
    experts = torch.randint(0, max(1, num_experts - 2), (num_tokens, top), dtype=torch.int32)
    with kernels():
        order, starts = plan(guarded(experts.to(DEV)), num_experts)
    expected = experts.flatten().sort(stable=True)
    assert order.tolist() == expected.indices.tolist()
    counts = experts.flatten().long().bincount(minlength=num_experts)
    assert starts.tolist() == [0, *counts.cumsum(0).tolist()]


@each_dtype
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 9, 40, 150])
@pytest.mark.parametrize(
    "num_experts, top, hidden, size",
    [(1, 1, 16, 16), (5, 2, 96, 40), (8, 8, 64, 24), (7, 3, 300, 70)],
)
def test_run_experts(num_experts, top, hidden, size, num_tokens, dtype):
    """Alone, and with all tokens at one expert, which has tiles of its own and others none."""
    x = randn(num_tokens, hidden, dtype=dtype)
    gate_up = randn(num_experts, 2 * size, hidden, dtype=dtype, scale=hidden**-0.5)
    down = randn(num_experts, hidden, size, dtype=dtype, scale=size**-0.5)
    for spread in (num_experts, top):
        ids = torch.stack([torch.randperm(spread)[:top] for _ in range(num_tokens)])
        experts = guarded(ids.int().to(DEV))
        weights = randn(num_tokens, top, dtype=dtype).abs()
        with kernels():
            found = run_experts(x, gate_up, down, experts, weights)
        sources = exact(x, gate_up, down)
        expected = run_experts_torch(*sources, ids, *exact(weights))
        check(padded(found, 1.0), padded(expected, 1.0), factor=4)


@pytest.mark.parametrize("share", [2, 10, 40, 100])
def test_every_tile_of_experts(share, monkeypatch):
    """The tile depends on how many tokens an expert gets; here each on a handful."""
    tile = grouped_linear.tile_for(share, 1, 1)
    monkeypatch.setattr(grouped_linear, "tile_for", lambda *_: tile)
    x, gate_up, down = randn(9, 80), randn(3, 2 * 72, 80) / 9, randn(3, 80, 72) / 9
    experts = torch.tensor([[0, 2]] * 9, dtype=torch.int32, device=DEV)
    weights = torch.full((9, 2), 0.5, device=DEV)
    with kernels():
        found = run_experts(x, gate_up, down, experts, weights)
    check(found, run_experts_torch(*exact(x, gate_up, down, experts, weights)), factor=4)


def test_with_a_fixed_order_experts_give_a_token_the_same_bits_in_any_company():
    x, gate_up, down = randn(40, 256), randn(5, 2 * 48, 256) / 16, randn(5, 256, 48) / 7
    experts, weights = (y[:40] for y in (torch.arange(80).view(40, 2) % 5, torch.rand(40, 2)))
    experts, weights = experts.int().to(DEV), weights.to(DEV)
    with kernels(), fixed_order(torch.zeros(9, dtype=torch.int32, device=DEV)):
        whole = run_experts(x, gate_up, down, experts, weights)
        parts = [
            run_experts(x[at], gate_up, down, experts[at].contiguous(), weights[at].contiguous())
            for at in (slice(0, 1), slice(1, 3), slice(3, 20), slice(20, 40))
        ]
    assert torch.equal(whole, torch.cat(parts))


# Into the cache


@each_dtype
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("block_size, heads, dim", [(16, 2, 64), (7, 3, 40), (1, 8, 128)])
def test_store_kvcache(block_size, heads, dim, num_tokens, slot_dtype, dtype):
    """Keys and values that lie in the merged projection reach their slots; -1 is nobody's."""
    shape = (25, block_size, heads, dim)
    (k_cache, k_before), (v_cache, v_before) = (cache_and_copy(shape, dtype) for _ in range(2))
    merged = randn(num_tokens, 4 * heads, dim, dtype=dtype)
    k, v = merged[:, heads : 2 * heads], merged[:, 3 * heads :]
    slots = some_slots(num_tokens, 25 * block_size, slot_dtype)
    with kernels():
        store_kvcache(k, v, k_cache, v_cache, slots)
    check_stored(k_cache, k_before, slots, k)
    check_stored(v_cache, v_before, slots, v)


@each_dtype
@pytest.mark.parametrize(
    "num_tokens, heads, kv_heads, dim",
    [(1, 4, 4, 64), (6, 4, 2, 128), (6, 6, 2, 64), (6, 4, 1, 32), (1, 8, 1, 64), (6, 6, 3, 64)]
    + [(6, 4, 2, 96), (513, 6, 3, 32)],
)
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no norm"])
def test_norm_rope_store(has_norm, num_tokens, heads, kv_heads, dim, dtype):
    """96 channels are no power of two: there the twin does the work, and the store is a kernel."""
    shape, eps = (80, 7, kv_heads, dim), 0.1
    (k_cache, k_before), (v_cache, v_before) = (cache_and_copy(shape, dtype) for _ in range(2))
    qkv = randn(num_tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    weights = [randn(dim, dtype=dtype) if has_norm else None for _ in range(2)]
    angles = torch.rand(50, 1, dim // 2) * 6.3
    cos_sin = guarded(torch.stack((angles.cos(), angles.sin()), dim=1) * 1.2)
    at = torch.randint(50, (num_tokens,)).to(DEV)
    slots = some_slots(num_tokens, 80 * 7, torch.int64)
    with kernels():
        caches = k_cache, v_cache
        q = norm_rope_store(qkv, *weights, eps, at, cos_sin, *caches, slots)
    k, v = (torch.zeros(num_tokens, 1, kv_heads, dim, dtype=torch.float64) for _ in range(2))
    weights = exact(*weights) if has_norm else weights
    inputs = *exact(qkv), *weights, eps, at.cpu(), cos_sin.cpu()
    check(q, norm_rope_store_torch(*inputs, k, v, torch.arange(num_tokens)))
    check_stored(k_cache, k_before, slots, k[:, 0], factor=1.0)
    check_stored(v_cache, v_before, slots, v[:, 0].to(dtype))


# Attention

SHAPES = [  # block_size, num_heads, num_kv_heads, head_dim: groups of 1, 2, 3, 4 and 8
    (16, 2, 2, 64),
    (64, 4, 2, 128),
    (7, 6, 2, 64),
    (256, 4, 1, 64),
    (16, 8, 1, 128),
]


@each_dtype
@pytest.mark.parametrize("num_splits, ordered", [(1, 0), (1, 1), (2, 1), (3, 0), (20, 0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(shape, num_splits, ordered, dtype):
    """At the edges of blocks, and for rows that are padding: their context is 0, their output 0."""
    block_size = shape[0]
    lens = [1, block_size - 1, 0, block_size, block_size + 1, 65 if block_size < 64 else 0]
    table_dtype = torch.int64 if num_splits % 2 else torch.int32
    batch = PagedBatch([(1, n) for n in lens], *shape, dtype, table_dtype)
    order = batch.on_device(batch.lens).argsort(descending=True).int() if ordered else None
    found = decode(batch, num_splits, order)
    real = torch.tensor(lens) > 0
    assert found.cpu()[~real].eq(0).all()
    check(found.cpu()[real], batch.expected(len(lens))[real], factor=2)


@each_dtype
@pytest.mark.parametrize("num_splits", [2, 18, 64])
@pytest.mark.parametrize("place", [5, 1150])
@pytest.mark.parametrize("group, head_dim", [(3, 64), (7, 128)])
def test_decode_joins_many_parts(group, head_dim, place, num_splits, dtype):
    """More parts than are joined at a time: 32, or 8 where the registers hold no more.

    What counts most is in an early one, or in a late one.
    """
    batch = PagedBatch([(1, 1190), (1, 40), (1, 1)], 16, group, 1, head_dim, dtype)
    for head in range(min(group, 4)):
        at = place + 10 * head
        batch.k_cache[batch.tables[0, at // 16], at % 16, 0] = batch.q[0, head] * 0.4
    check(decode(batch, num_splits), batch.expected(3), factor=2)


@each_dtype
def test_decode_where_the_parts_differ_much(dtype):
    """The largest score comes early, late, or in the middle: weights far below it count for 0."""
    batch = PagedBatch([(1, 200)] * 4, 16, 2, 1, 64, dtype)
    for seq, place in enumerate([0, 70, 130, 199]):
        block = batch.tables[seq, place // 16]
        batch.k_cache[block, place % 16, 0] = batch.q[seq, 0] * 4
    check(decode(batch, 3), batch.expected(4), factor=4)


@each_dtype
def test_decode_chooses_its_parts_and_repeats_itself(dtype):
    batch = PagedBatch([(1, 150)], 16, 2, 1, 64, dtype)
    first = decode(batch)
    check(first, batch.expected(1), factor=2)
    assert torch.equal(bits(first), bits(decode(batch)))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_of_whole_prompts(shape, dtype):
    edge = shape[0]
    lens = {1, edge - 1, edge, edge + 1, 2 * edge + 1, 65, 130}
    batch = PagedBatch([(n, n) for n in sorted(lens) if n < 260], *shape, dtype, torch.int64)
    check(prefill(batch), batch.expected(), factor=2)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_after_a_prefix(shape, dtype):
    """Chunks of one token and of many, behind a text that ends at, before and behind an edge."""
    edge = shape[0]
    spans = [(1, edge), (1, edge + 1), (2, edge + 1), (66, edge + 66), (3, 3), (5, 2 * edge - 1)]
    batch = PagedBatch(spans, *shape, dtype)
    check(prefill(batch), batch.expected(), factor=2)


@each_dtype
@pytest.mark.parametrize("num_new", [31, 32, 64, 65])
@pytest.mark.parametrize("prefix", [0, 1, 30, 31, 62, 64])
def test_prefill_at_the_edges_of_tiles(prefix, num_new, dtype):
    batch = PagedBatch([(num_new, prefix + num_new)], 64, 1, 1, 64, dtype)
    check(prefill(batch), batch.expected(), factor=2)


# Prefill attention on a Hopper GPU

HAS_HOPPER = prefill_hopper.HAS_GLUON and ON_GPU and jit.is_hopper(torch.empty(0, device=DEV))
needs_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="no Hopper GPU, or no Gluon")
HALVES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)
HOPPER_SHAPES = [  # groups of 1, 2 and 8
    (128, 2, 2, 64),
    (256, 4, 2, 128),
    (128, 8, 1, 128),
    (384, 8, 1, 64),
]


def prefill_after(batch: PagedBatch, first_seq: int) -> Tensor:
    """The answer of the kernel that `paged_prefill_attention` chooses, NaN before `first_seq`."""
    inputs = batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.on_device(batch.lens)
    starts, longest = batch.on_device(batch.starts), max(num_new for num_new, _ in batch.spans)
    with kernels():
        return paged_prefill_attention(*inputs, starts, longest, batch.scale, first_seq=first_seq)


@pytest.fixture
def launched(monkeypatch) -> list[bool]:
    """For every prefill since, whether the Hopper kernel takes it."""
    asked, takes = [], prefill_attention.takes_hopper

    def noting(*args) -> bool:
        asked.append(takes(*args))
        return asked[-1]

    monkeypatch.setattr(prefill_attention, "takes_hopper", noting)
    return asked


@needs_hopper
@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("first_seq", [0, 1])
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_prefill_on_hopper(shape, first_seq, dtype, launched, monkeypatch):
    """Prompts and chunks that end at, before and behind the edges of tiles; NaN is all around."""
    spans = [(300, 300), (1, 1), (512, 512), (77, 500), (1, 700), (129, 385), (0, 0), (255, 1023)]
    spans += [(256, 1024), (63, 64), (640, 1281), (33, 289), (127, 128), (65, 900), (513, 513)]
    monkeypatch.setattr(prefill_hopper, "EMPTY", 9)
    table_dtype = torch.int64 if first_seq else torch.int32
    batch = PagedBatch(spans + [(0, 0)] * 2, *shape, dtype, table_dtype)
    found, skipped = prefill_after(batch, first_seq), batch.starts[first_seq]
    assert launched == [True]
    assert found[:skipped].isnan().all()
    expected = batch.expected()[skipped:]
    check(found[skipped:], expected, factor=2)
    assert torch.equal(bits(prefill_after(batch, first_seq)[skipped:]), bits(found[skipped:]))


@needs_hopper
@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("prefix", [0, 1, 63, 127, 128, 3000])
@pytest.mark.parametrize("num_new", [512, 575, 577, 639, 1500])
def test_both_prefill_kernels_agree(num_new, prefix, dtype, monkeypatch, launched):
    batch = PagedBatch([(num_new, prefix + num_new)], 256, 2, 1, 128, dtype)
    found = prefill(batch)
    monkeypatch.setattr(prefill_attention, "takes_hopper", lambda *_: False)
    plain = prefill(batch)
    assert launched == [True]
    check(found, plain.double().cpu(), factor=3)
    check(found, batch.expected(), factor=2)


@needs_hopper
@pytest.mark.gpu
def test_on_hopper_a_row_without_blocks_follows_no_address(launched):
    """As below, for the other kernel."""
    batch = PagedBatch([(9, 70), (600, 800), (1, 70)], 128, 4, 2, 64, torch.bfloat16)
    expected = batch.expected()
    batch.k_cache[0], batch.v_cache[0] = 0, 0
    batch.tables[1] = -1
    first, stop = batch.starts[1:3]
    found = prefill(batch).cpu()
    assert launched == [True] and found[first:stop].eq(0).all()
    found[first:stop] = expected[first:stop].to(found.dtype)
    check(found, expected, factor=2)


@needs_hopper
@pytest.mark.gpu
def test_on_hopper_a_nan_in_one_requests_blocks_stays_in_its_rows(launched):
    batch = PagedBatch([(9, 70), (600, 600), (70, 150)], 128, 4, 2, 64, torch.bfloat16)
    clean, own = prefill(batch), slice(0, batch.starts[1])
    for cache in (batch.k_cache, batch.v_cache):
        cache[batch.tables[0, :1].long()] = torch.nan
    batch.q[own] = torch.nan
    found = prefill(batch)
    assert launched == [True, True] and found[own].isnan().all()
    assert torch.equal(bits(found[own.stop :]), bits(clean[own.stop :]))


@needs_hopper
@pytest.mark.gpu
def test_on_hopper_a_recorded_prefill_follows_its_inputs(launched):
    """What a copy has to know is frozen in a graph; lengths, tables and numbers are not."""
    batch = PagedBatch([(600, 900), (40, 40)], 128, 4, 2, 128, torch.bfloat16)
    other = PagedBatch([(40, 40), (600, 900)], 128, 4, 2, 128, torch.bfloat16)
    names, cases = ("q", "k_cache", "v_cache", "tables"), []
    for one in (other, batch):
        values = [getattr(one, name).clone() for name in names]
        values += [one.on_device(one.lens), one.on_device(one.starts)]
        cases.append((values, one.expected()))
    inputs = [x.clone() for x in cases[1][0]]
    out = torch.empty_like(batch.q)
    paged_prefill_attention(*inputs, 600, batch.scale, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_prefill_attention(*inputs, 600, batch.scale, out)
    for values, expected in cases:
        for x, value in zip(inputs, values):
            x.copy_(value)
        out.fill_(torch.nan)
        graph.replay()
        check(out, expected, factor=2)
    assert all(launched)


@pytest.mark.parametrize(
    "change, takes",
    [
        ({}, True),
        ({"dtype": torch.float16, "head_dim": 128, "block_size": 256}, True),
        ({"block_size": 384}, True),
        ({"max_new": 511}, False),
        ({"long": False, "num_seqs": 8}, False),  # nearly all programs would be empty
        ({"num_seqs": 8}, False),
        ({"num_seqs": 2}, True),
        ({"block_size": 64}, False),
        ({"block_size": 192}, False),
        ({"head_dim": 32}, False),
        ({"head_dim": 256}, False),
        ({"dtype": torch.float32}, False),
        ({"skip": 1, "long": False}, False),  # an address that is no multiple of 16
        ({"hopper": False}, False),
        ({"gluon": False}, False),
    ],
    ids=str,
)
def test_who_takes_a_prefill(change, takes, monkeypatch):
    given = dict(
        dtype=torch.bfloat16,
        head_dim=64,
        block_size=128,
        max_new=512,
        skip=0,
        long=True,
        num_seqs=1,
    )
    given |= dict(hopper=True, gluon=True) | change
    monkeypatch.setattr(prefill_hopper, "HAS_GLUON", given["gluon"])
    monkeypatch.setattr(prefill_hopper, "is_hopper", lambda x: given["hopper"])
    shape = 4, 2, given["head_dim"]
    q = torch.zeros(4 * 2 * given["head_dim"] + given["skip"], dtype=given["dtype"])
    q = q[given["skip"] :].view(shape)
    cache = torch.zeros(2, given["block_size"], 1, given["head_dim"], dtype=given["dtype"])
    q = torch.cat([q] * 128) if given["long"] else q
    num_seqs = given["num_seqs"]
    assert prefill_hopper.takes_hopper(q, cache, cache, given["max_new"], num_seqs) == takes


@each_dtype
@pytest.mark.parametrize("attend", [decode, prefill])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_may_lie_anywhere(sign, attend, dtype):
    """Softmax sees differences alone: not that every score is about 2000, or -2000.

    Keys are multiples of 1/64, so that float32 adds up each score without rounding it: of other
    keys, torch's own softmax in float32 is now and then further off than what is allowed here.
    """
    batch = PagedBatch([(1, 70)], 16, 1, 1, 64, dtype)
    batch.q.copy_(batch.q.sign() * 16)
    batch.k_cache.mul_(64).round_().div_(64)
    batch.k_cache += sign * batch.q
    expected = batch.expected(1)
    check(attend(batch), expected, factor=100 if dtype == torch.float32 else 4)


@each_dtype
@pytest.mark.parametrize("spans", [[(1, 9), (1, 33)], [(1, 20), (1, 3), (9, 9), (70, 80)]], ids=str)
def test_kernels_share_a_batch(spans, dtype):
    """Decodes come first, then the others: one output, each row by the kernel that owns it."""
    batch = PagedBatch(spans, 16, 4, 2, 64, dtype, torch.int64)
    caches = batch.k_cache, batch.v_cache
    with kernels():
        found = paged_attention(batch.q, *caches, batch.context(2), batch.scale, "triton")
    check(found, batch.expected(2), factor=2)


def test_each_kernel_writes_its_own_rows_alone():
    batch = PagedBatch([(1, 20), (1, 3), (9, 9), (70, 80)], 16, 4, 2, 64, torch.float32)
    lens, starts = batch.on_device(batch.lens), batch.on_device(batch.starts)
    inputs = batch.q, batch.k_cache, batch.v_cache
    with kernels():
        for splits in (1, 2):
            out = torch.empty_like(batch.q)
            paged_decode_attention(*inputs, batch.tables[:2], lens, batch.scale, out, splits)
            assert out[:2].isfinite().all() and out[2:].isnan().all()
        out = torch.empty_like(batch.q)
        paged_prefill_attention(*inputs, batch.tables, lens, starts, 70, batch.scale, out, 2)
        assert out[:2].isnan().all() and out[2:].isfinite().all()


@each_dtype
@pytest.mark.parametrize("attend", [decode, prefill])
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_row_without_blocks_follows_no_address(block_size, attend, dtype):
    """It has lost its table, and not its length: before the cache lies poison, block 0 is zeros."""
    spans = [(1, 70)] * 3 if attend is decode else [(9, 70), (80, 80), (1, 70)]
    batch = PagedBatch(spans, block_size, 4, 2, 64, dtype)
    expected = batch.expected(3 if attend is decode else 0)
    batch.k_cache[0], batch.v_cache[0] = 0, 0
    batch.tables[1] = -1
    first, stop = batch.starts[1:3]
    found = attend(batch).cpu()
    assert found[first:stop].eq(0).all()
    found[first:stop] = expected[first:stop].to(dtype)
    check(found, expected, factor=2)


@pytest.mark.parametrize("num_counters", [0, 3, 4])
def test_a_batch_that_asks_for_more_counters_gets_its_own(num_counters):
    """Two sequences with two key heads, in parts; what is handed over is left zero."""
    batch = PagedBatch([(1, 70), (1, 90)], 16, 4, 2, 64, torch.float32)
    counters = torch.zeros(num_counters, dtype=torch.int32, device=DEV)
    inputs = batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.on_device(batch.lens)
    with kernels():
        found = paged_decode_attention(*inputs, batch.scale, None, 3, counters=counters)
    check(found, batch.expected(2), factor=2)
    assert not counters.any()


# Filters


def drawn(logits: Tensor, draw: list[Tensor], filters: list[Tensor]) -> Tensor:
    """The tokens that the kernels choose; -7 where nobody asks for a filter."""
    token_ids, before = torch.full((len(logits),), -7, device=DEV), logits.clone()
    on_device = guarded(logits)
    with kernels():
        sample_filtered_(
            token_ids, on_device, tuple(x.to(DEV) for x in draw), tuple(x.to(DEV) for x in filters)
        )
    assert torch.equal(bits(on_device.cpu()), bits(before))
    return token_ids.cpu()


def winners(scores: Tensor, noise: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor):
    """The tokens that a sort in float64 finds; scores: [num_seqs, num_columns]"""
    kept = keep_likely(scores, top_ks, top_ps, min_ps)
    return (kept - noise.double().log()).argmax(dim=-1)


@pytest.mark.parametrize("room", [2048, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [1, 100, 5000 if ON_GPU else 1500])
def test_filters_draw_what_a_sort_in_float64_draws(num_columns, dtype, room, monkeypatch):
    """From candidates, and where there are too many from the whole row; ties too.

    Of masses that all but reach the nucleus either answer is right.
    """
    monkeypatch.setattr(candidates, "ROOM", room)
    monkeypatch.setattr(candidates, "CHUNK", 32 if ON_GPU else 4)
    kinds, n = 16, 16 * (40 if ON_GPU else 1)
    logits = torch.randn(kinds, num_columns) * 3
    logits[::3] = logits[::3].round()
    heat = torch.rand(kinds) * 2 + 0.1
    top_ks = torch.randint(1, num_columns + 2, (kinds,)) * (torch.rand(kinds) < 0.7)
    top_ks[::4] = 3
    top_ps = torch.rand(kinds).where(torch.rand(kinds) < 0.7, 1.0)
    min_ps = (torch.rand(kinds) * 0.3) * (torch.rand(kinds) < 0.3)
    logits, heat, *filters = (
        x[torch.arange(n) % kinds] for x in (logits.to(dtype), heat, top_ks, top_ps, min_ps)
    )
    seeds, places = torch.randint(2**60, (n,)), torch.arange(n)
    found = drawn(logits, [heat, seeds, places], filters)
    asks = (filters[0] > 0) | (filters[1] < 1) | (filters[2] > 0)
    scores = logits.double() / heat[:, None].double()
    noise = exponential_noise(seeds, places, num_columns)
    top_ps = filters[1].double()
    right = [
        winners(scores, noise, filters[0], top_ps + edge * (top_ps < 1), filters[2].double())
        for edge in (-1e-5, 1e-5)
    ]
    wrong = (found != right[0]) & (found != right[1]) & asks
    assert wrong.sum() <= 1  # two scores may be one but for rounding
    assert (found[~asks] == -7).all()


def test_filters_at_their_edges():
    inf = torch.inf
    cases = [  # logits, top_k, top_p, min_p, kept
        ([1.0, 3, 2, 3, 0], 1, 1.0, 0.0, [1]),
        ([1.0, 3, 2, 3, 0], 3, 1.0, 0.0, [1, 2, 3]),
        ([0.0, 0, 0, 0, -inf], 0, 0.5, 0.0, [0, 1]),
        ([0.0, 0, 0, 0, -inf], 3, 0.5, 0.0, [0, 1]),
        ([0.0, 2, 1, 1, 1], 0, 1e-45, 0.0, [1]),
        ([0.0, 2, 1, 1, 1], 2, 0.0, 0.0, [1]),
        ([-5.0, -2, -1, -1, -7], 2, 1.0, 0.0, [2, 3]),
        ([-inf, -inf, 4, -inf, -inf], 4, 0.99, 0.0, [2]),
        ([1e30, -1e30, 0, 0, 0], 0, 0.9, 0.0, [0]),
        ([-0.0, 0, -0.0, 0, 0], 2, 1.0, 0.0, [0, 1]),
        ([1.0, 2, 2, 0, 1.9], 0, 1.0, 0.8, [1, 2, 4]),
        ([1.0, 2, 2, 0, 1.9], 0, 1.0, 1.0, [1, 2]),
        ([1.0, 2, 2, 0, 1.9], 1, 1.0, 0.8, [1]),
        ([1.0, 2, 2, 0, 1.9], 0, 0.5, 0.8, [1, 2]),
    ]
    draws = 64 if ON_GPU else 2  # in the interpreter each takes 100 ms
    for dtype, room in product((torch.float32, torch.bfloat16) if ON_GPU else DTYPES[:1], (32, 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(candidates, "ROOM", room)
            patch.setattr(candidates, "CHUNK", 1)
            for logits, *filters, kept in cases:
                row = torch.tensor([logits]).to(dtype).repeat(draws, 1)
                draw = [torch.ones(draws), torch.arange(draws), torch.arange(draws)]
                found = drawn(row, draw, [torch.full((draws,), x) for x in filters])
                assert {*found.tolist()} <= {*kept}, (dtype, room, logits, filters)
                assert not ON_GPU or {*found.tolist()} == {*kept}


def test_a_filtered_row_with_a_nan_has_no_token():
    for nan in (torch.nan, -torch.nan):
        logits = torch.randn(3, 50)
        logits[0, 7] = logits[1, 49] = nan
        filters = [torch.tensor([0, 3, 3]), torch.tensor([0.5, 1, 1]), torch.zeros(3)]
        found = drawn(logits, [torch.ones(3), torch.arange(3), torch.arange(3)], filters)
        assert found[:2].tolist() == [-1, -1] and found[2] >= 0


# Caches in which 32 bits do not count the elements


@pytest.fixture(scope="module")
def large_caches() -> list[Tensor]:
    """Zeros: 40 blocks more than 2**31 elements have."""
    return [torch.zeros(2**13 + 40, 256, 8, 128, dtype=torch.bfloat16, device=DEV) for _ in "kv"]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["store_kvcache", "norm_rope_store"])
def test_store_in_a_large_cache(kernel, large_caches):
    num_slots = len(large_caches[0]) * 256
    slots = torch.tensor([num_slots - 1, 2**21, 2**21 - 1, 0, -1, 2**21 + 5000], device=DEV)
    kept = slots[slots >= 0]
    qkv = randn(6, 24 * 128, dtype=torch.bfloat16)
    ones = torch.ones(128, dtype=torch.bfloat16, device=DEV)
    _, k, v = qkv.view(6, 3, 8, 128).unbind(1)
    with kernels():
        if kernel == "store_kvcache":
            store_kvcache(k, v, *large_caches, slots)
        else:  # cos 1 and sin 0: keys are normalised and do not turn
            turn = torch.tensor([1.0, 0.0], device=DEV).view(1, 2, 1, 1).repeat(1, 1, 1, 64)
            norm_rope_store(qkv, ones, ones, 0.1, slots * 0, turn, *large_caches, slots)
            k = torch.nn.functional.rms_norm(k.float(), (128,), eps=0.1)
    for cache, expected in zip(large_caches, (k, v)):
        check(cache.flatten(0, 1)[kept], expected[slots >= 0].cpu())
        cache.flatten(0, 1)[kept] = 0
        assert not any(part.any() for part in cache.split(512))


@pytest.mark.gpu
@pytest.mark.parametrize("attend", [decode, prefill])
def test_attention_in_a_large_cache(attend, large_caches):
    spans = [(1, 700), (1, 255)] if attend is decode else [(300, 700), (70, 70)]
    batch = PagedBatch(spans, 256, 16, 8, 128, torch.bfloat16)
    expected, n = batch.expected(2 if attend is decode else 0), len(batch.k_cache)
    for large, small in zip(large_caches, (batch.k_cache, batch.v_cache)):
        large[-n:] = small
    batch.tables += len(large_caches[0]) - n
    batch.k_cache, batch.v_cache = large_caches
    found = attend(batch)
    for large in large_caches:
        large[-n:] = 0
    check(found, expected)


# Sampling


@each_dtype
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-30, 0.1, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [1, 100, 2048, 2049, 5000])
def test_sample(vocab_size, temperature, dtype):
    n = 16
    logits = (torch.randn(n, vocab_size) * 2).to(dtype)
    positions = torch.randint(0, 2**20, (n,))
    draw(logits, torch.full((n,), temperature), wide_integers(n), positions)


@pytest.mark.parametrize("cuts", [(2048,), (700, 4500), (1, 2049)], ids=str)
def test_parts_of_a_vocabulary_that_lies_in_several_places_give_the_same_token(cuts):
    """Each place knows its own columns; the parts of all of them, side by side, are enough."""
    logits = torch.randn(9, 5000)
    logits[7, 4999] = logits[8] = torch.nan
    temperatures = torch.tensor([0.0, 1e-30, 0.1, 0.6, 1.0, 2.0, 5.0, 1.0, 0.0]).to(DEV)
    seeds, positions = wide_integers(9).to(DEV), torch.arange(9).to(DEV)
    places = list(zip((0, *cuts), (*cuts, 5000)))
    with kernels():
        expected = sample(guarded(logits), temperatures, seeds, positions)
        found = [
            sample_parts(guarded(logits[:, a:b]), temperatures, seeds, positions, a)
            for a, b in places
        ]
        parts = tuple(guarded(torch.cat(part, dim=1)) for part in zip(*found))
        assert sample_best(parts, temperatures).tolist() == expected.tolist()
    assert expected.tolist()[7:] == [-1, -1]


def test_sample_a_batch_of_many_temperatures():
    temperatures = torch.tensor([0.0, 1e-30, 0.1, 0.6, 1.0, 2.0, 5.0, 0.0])
    positions = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 3, 4])
    draw(torch.randn(8, 5000), temperatures, wide_integers(8), positions)


@pytest.mark.parametrize("gap", [-2e-3, 2e-3])
def test_sample_tells_the_smallest_noise_apart(gap):
    """1 - u has lost what a tiny u has: two tokens whose scores differ by the gap would swap."""
    seeds, positions = wide_integers(1000), torch.arange(1000)
    noise = exponential_noise(seeds, positions, 5000)
    rows = noise.amin(dim=1).topk(16, largest=False).indices
    logits, noise = torch.full((16, 5000), -1e4), noise[rows]
    for row, first in enumerate(noise.argmin(dim=1).tolist()):
        second = (first + 2500) % 5000
        logits[row, first] = 0
        logits[row, second] = (noise[row, second] / noise[row, first]).log() + gap
    draw(logits, torch.ones(16), seeds[rows], positions[rows])


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_sample_from_equal_logits(temperature):
    """At temperature 0 the first of the best wins, also where they lie in different parts."""
    logits = torch.zeros(4, 5000)
    for row, places in enumerate([(0, 4999), (7, 8), (2047, 2048), (3000, 4096, 4999)]):
        logits[row, list(places)] = 5.0
    found = draw(logits, torch.full((4,), temperature), wide_integers(4), torch.arange(4))
    if temperature == 0:
        assert found.tolist() == [0, 7, 2047, 3000]


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.6, 2.0])
@pytest.mark.parametrize("floor", [-1e4, -torch.inf])
def test_sample_from_extreme_logits(floor, temperature):
    """All the mass is on one token, wherever it lies."""
    places = [0, 1, 2047, 2048, 4095, 4096, 4999]
    logits = torch.full((7, 5000), floor)
    logits[range(7), places] = 1e4
    found = draw(logits, torch.full((7,), temperature), wide_integers(7), torch.arange(7))
    assert found.tolist() == places


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_a_nan_has_no_token_and_the_others_have_theirs(temperature):
    """Wherever the NaN is: in the first part, at an edge, in the last one, everywhere."""
    temperatures, positions = torch.full((8,), temperature), torch.arange(8)
    logits, seeds = torch.randn(8, 5000), wide_integers(8)
    whole = draw(logits, temperatures, seeds, positions)
    broken = logits.clone()
    broken[1, 0] = broken[2, 2047] = broken[3, 2048] = broken[5, 4999] = broken[6] = torch.nan
    with kernels():
        found = sample(guarded(broken), *(x.to(DEV) for x in (temperatures, seeds, positions)))
    rows = [1, 2, 3, 5, 6]
    assert found.tolist() == [-1 if i in rows else token for i, token in enumerate(whole.tolist())]
    sampling = SamplingTensors(temperatures, seeds, positions, all_greedy=False)
    assert sample_torch(broken, sampling)[rows].eq(-1).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_infinite_logits_stay_within_the_vocabulary(temperature):
    """Whatever the logits: broken weights shall not send the next step out of the embedding."""
    logits = torch.randn(4, 5000)
    logits[0], logits[1], logits[2, 3000] = -torch.inf, torch.inf, torch.inf
    inputs = guarded(logits), torch.full((4,), temperature), wide_integers(4), torch.arange(4)
    with kernels():
        found = sample(*(x.to(DEV) for x in inputs))
    assert ((0 <= found) & (found < 5000)).all()


@pytest.mark.parametrize("size", [1, 5, 256, 300])
def test_placeholders_become_tokens_of_the_vocabulary(size):
    """-1 - i is what row i has sampled, and 0 where that is -1, which no embedding has."""
    sampled = torch.randint(0, 1000, (512,))
    sampled[::3] = -1
    row, known = torch.randint(0, 512, (size,)), torch.randint(0, 1000, (size,))
    is_known = torch.rand(size) < 0.3
    is_known[:1] = False
    row[:1] = 3 * (row[:1] // 3)
    ids = torch.where(is_known, known, -1 - row)
    expected = torch.where(is_known, known, sampled[row].clamp(min=0))
    slots = torch.randperm(999)[:size].where(torch.rand(size) < 0.8, -1)
    noted = torch.full((999,), -5, dtype=torch.int32)
    noted[slots[slots >= 0]] = expected[slots >= 0].int()
    for run, put in ((kernels, guarded), (nullcontext, torch.clone)):
        history = torch.full((999,), -5, dtype=torch.int32)
        history = history.to(DEV) if run is kernels else history
        with run():
            found = resolve_tokens(put(ids), put(sampled), history, put(slots))
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(history.cpu(), noted)


# Penalties


def said(lengths: list[int], num_columns: int, block_size: int) -> dict[str, Tensor]:
    """Sequences of few different tokens, each in scattered blocks of its own."""
    n, sizes = len(lengths), [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(sizes) + 3).int()
    history = torch.randint(-7, num_columns + 40, (len(blocks), block_size), dtype=torch.int32)
    tables = torch.full((n + 2, max(sizes) + 1), -1, dtype=torch.int32)
    rows, start = torch.randperm(n + 2)[:n], 0
    for row, size in zip(rows, sizes, strict=True):
        tables[row, :size] = blocks[start : start + size]
        start += size
    few = torch.randint(0, num_columns, (9,))
    history[:, ::2] = few[torch.randint(0, 9, history[:, ::2].shape)].int()
    return dict(
        history=history,
        counts=torch.zeros(penalties.PROGRAMS, num_columns, dtype=torch.int32),
        block_tables=tables,
        table_rows=rows,
        lengths=torch.tensor(lengths),
        prompt_lens=(torch.rand(n) * torch.tensor(lengths)).long(),
        repetitions=(torch.rand(n) + 0.5).where(torch.rand(n) < 0.7, 1.0),
        presences=torch.randn(n).where(torch.rand(n) < 0.7, 0.0),
        frequencies=torch.randn(n).where(torch.rand(n) < 0.7, 0.0),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize("lengths", [[1], [70, 0, 5], [3, 1500, 1024] if not ON_GPU else [9] * 300])
def test_penalties_are_those_of_the_definition(lengths, first, dtype):
    """In float64, token by token; no count is left, and what is no column does no harm."""
    num_columns, fields = 200, said(lengths, 200, 16)
    logits = torch.randn(len(lengths), num_columns).to(dtype) * 4
    expected = logits.double()
    for seq, length in enumerate(lengths):
        table = fields["block_tables"][fields["table_rows"][seq]]
        tokens = [int(fields["history"][table[at // 16], at % 16]) - first for at in range(length)]
        r, p, f = (float(fields[name][seq]) for name in ("repetitions", "presences", "frequencies"))
        generated = tokens[int(fields["prompt_lens"][seq]) :]
        for token in {token for token in tokens if 0 <= token < num_columns}:
            x, times = float(logits[seq, token]), generated.count(token)
            expected[seq, token] = (x / r if x > 0 else x * r) - f * times - p * (times > 0)
    twin = logits.clone()
    penalise_torch_(twin, Penalties(**fields), first)
    found = guarded(logits)
    on_device = Penalties(**{name: tensor.to(DEV) for name, tensor in fields.items()})
    with kernels():
        penalise_(found, on_device, first)
    for changed in (twin, found.cpu()):
        torch.testing.assert_close(
            changed.double(), expected.to(dtype).double(), rtol=0.02, atol=1e-5
        )
        assert not ((changed != logits) & (expected == logits.double())).any()
    assert not on_device.counts.any()


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("num_columns", [1, 320, 4096, 12_799])
def test_log_probabilities_are_those_of_float64_and_ties_go_to_the_first(num_columns, count, dtype):
    x = torch.randn(6, num_columns) * 3
    x[1], x[2] = x[1].round(), 0.0  # many are equal
    x[2, ::3] = -0.0
    x[3, num_columns // 2 + 1 :], x[4] = -torch.inf, x[4] * 100
    logits, sampled = x.to(dtype), torch.randint(num_columns, (9,))
    wanted = torch.randint(num_columns, (6, 4))
    wanted[:, 0], wanted[::2, 3] = torch.randperm(9)[:6], -1
    token_ids = torch.where(wanted[:, 3] < 0, sampled[wanted[:, 0]], wanted[:, 3])
    scores, count = logits.double().log_softmax(dim=1), min(count, num_columns)
    ids = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :count]
    told = scores.gather(1, torch.cat([token_ids.unsqueeze(1), ids], dim=1))
    with kernels():
        found = logprobs_of(guarded(logits), guarded(wanted), guarded(sampled), count)
    for each in (found.cpu(), logprobs_torch(logits, wanted, sampled, count)):
        assert torch.equal(each[:, 1 + count :], ids.float())
        torch.testing.assert_close(each[:, : 1 + count].double(), told, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_token_is_told_nothing_and_harms_nobody():
    """Its logits held a NaN, so that -1 was sampled."""
    logits = torch.randn(3, 5000)
    logits[1, 4999] = torch.nan
    wanted = torch.tensor([[row, 7, 0, -1] for row in range(3)])
    with kernels():
        found = logprobs_of(
            guarded(logits), guarded(wanted), guarded(torch.tensor([5, -1, 6])), 3
        ).cpu()
    expected = logprobs_torch(logits, wanted, torch.tensor([5, 0, 6]), 3)
    assert found[1, :4].isnan().all()
    torch.testing.assert_close(found[::2], expected[::2])


# A fixed order


@pytest.mark.parametrize("shape", [(16, 64, 16), (64, 128, 32)], ids=str)
def test_an_exact_dot_has_the_same_bits_in_each_place(shape):
    """The product of one row and one column, whatever lies beside them."""
    m, k, n = shape
    a, b = torch.randn(m, k).numpy(), torch.randn(k, n).numpy()
    whole = exact_dot(a, b, a.dtype)
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(a @ b))
    for _ in range(20):
        rows, columns = torch.randperm(m)[: 1 + m // 3], torch.randperm(n)[: 1 + n // 2]
        part = exact_dot(a[rows], b[:, columns], a.dtype)
        assert (part == whole[rows][:, columns]).all()


@each_dtype
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (6, 2, 32), (8, 1, 16)])
def test_fixed_attention_is_attention_and_the_same_for_any_portion(
    heads, kv_heads, head_dim, dtype, monkeypatch
):
    """Whole prompts, their last tokens, and decodes, split and not: right, and equal to the bit.

    As float32: rounded to half precision, most of what differs in its last bits would be equal.
    """
    if not ON_GPU:
        use_exact_dots(monkeypatch)
    spans = [(70, 70), (1, 1), (20, 90)]
    batch = PagedBatch(spans, 16, heads, kv_heads, head_dim, dtype)
    caches, lens = (batch.k_cache, batch.v_cache), batch.on_device(batch.lens)

    def attend(count: int) -> list[Tensor]:
        """The last `count` tokens of each text, or all that it asks for."""
        rows = [
            batch.q[stop - min(count, stop - start) : stop]
            for start, stop in zip(batch.starts, batch.starts[1:])
        ]
        starts = batch.on_device([0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()])
        q = torch.cat(rows)
        inputs = q, *caches, batch.tables, lens, starts, min(count, 70), batch.scale
        with kernels():
            found = fixed_attention(*inputs, torch.empty_like(q, dtype=torch.float32))
        return list(found.split([len(row) for row in rows]))

    def decode(splits: int, most_bytes: int) -> list[Tensor]:
        """The last token of each text, by so many programs a context."""
        monkeypatch.setattr(fixed_attention_module, "splits_for", lambda rows, device: splits)
        monkeypatch.setattr(fixed_attention_module, "MOST_BYTES", most_bytes)
        q = torch.cat([batch.q[stop - 1 : stop] for stop in batch.starts[1:]])
        starts, counters = batch.on_device([0, 1, 2, 3]), batch.on_device([0] * 3 * kv_heads)
        out = torch.empty_like(q, dtype=torch.float32)
        with kernels():
            found = fixed_decode(q, caches, batch.tables, lens, starts, batch.scale, out, counters)
        assert not counters.any()
        return list(found.split(1))

    whole = attend(70)
    check(torch.cat(whole).to(dtype), batch.expected(), factor=2)
    for count in (1, 2, 17, 33):
        for part, full in zip(attend(count), whole, strict=True):
            assert torch.equal(part, full[-len(part) :])
    for splits, most_bytes in ((1, 1 << 20), (2, 1 << 20), (3, 1 << 20), (66, 1 << 20), (2, 1)):
        for part, full in zip(decode(splits, most_bytes), attend(1), strict=True):
            assert torch.equal(part, full)


# One request's NaN


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("attend", [decode, prefill])
def test_a_nan_in_one_requests_blocks_stays_in_its_rows(attend, num_splits):
    """The others are bit for bit what they were; block 0, with which tables are padded, is its."""
    spans = [(1, 70), (1, 20), (1, 150)] if attend is decode else [(9, 70), (20, 20), (70, 150)]
    options = (num_splits,) if attend is decode else ()
    batch = PagedBatch(spans, 16, 4, 2, 64, torch.float32)
    clean = attend(batch, *options)
    for cache in (batch.k_cache, batch.v_cache):
        cache[batch.tables[0, :5].long()] = torch.nan
    own = slice(0, batch.starts[1])
    batch.q[own] = torch.nan
    found = attend(batch, *options)
    assert found[own].isnan().all()
    assert torch.equal(found[own.stop :], clean[own.stop :])
    twin = batch.expected(len(spans) if attend is decode else 0)
    check(found[own.stop :], twin[own.stop :], factor=2)


@pytest.mark.parametrize("name", ["add_rms_norm", "silu_and_mul", "small_linear", "norm_rope"])
def test_a_nan_in_one_tokens_row_stays_there(name):
    x = randn(3, 6 * 64)
    weight, cos_sin, slots = randn(64), randn(3, 2, 1, 32), torch.arange(3, device=DEV)
    caches = [torch.zeros(1, 4, 1, 64, device=DEV) for _ in "kv"]
    ways = {
        "add_rms_norm": lambda x: add_rms_norm(x, x, randn(6 * 64).fill_(1), 0.1)[0],
        "silu_and_mul": silu_and_mul,
        "small_linear": lambda x: small_linear(x, weight.expand(6, 64).reshape(1, -1)),
        "norm_rope": lambda x: norm_rope_store(
            x, weight, weight, 0.1, slots, cos_sin, *caches, slots
        ),
    }
    with kernels():
        clean = ways[name](x)
        stored = [cache.clone() for cache in caches]
        x[1] = torch.nan
        found = ways[name](x)
    others = [0, 2]
    assert torch.equal(found[others], clean[others]) and found[1].isnan().all()
    for cache, before in zip(caches, stored):
        assert torch.equal(cache[0, [0, 2, 3]], before[0, [0, 2, 3]])

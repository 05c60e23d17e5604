"""Inputs on which every kernel is measured against its torch twin, and what measures them.

Kernels run on the GPU if there is one, else in Triton's interpreter, which needs TRITON_INTERPRET
to be set before anything imports triton.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: see conftest.py")
    os.environ["TRITON_INTERPRET"] = "1"

from nanovllm.kernels import jit  # noqa: E402 - imports triton
from nanovllm.kernels.decode_attention import paged_decode_attention  # noqa: E402
from nanovllm.kernels.prefill_attention import paged_prefill_attention  # noqa: E402
from nanovllm.kernels.sample import sample  # noqa: E402
from nanovllm.layers.attention import paged_attention  # noqa: E402
from nanovllm.layers.sampler import SamplingTensors, exponential_noise, sample_torch  # noqa: E402
from nanovllm.utils.context import NUM_COUNTERS, Context  # noqa: E402

DEV = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter computes in numpy, which knows no bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if ON_GPU else torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of a row's largest
SEED = int(os.environ.get("NANOVLLM_KERNEL_SEED", random.SystemRandom().randrange(2**31)))
GUARD = 4096  # elements of poison on either side of a tensor


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal random numbers on the device, amid NaN: who reads past an end will show it."""
    return guarded((torch.randn(shape) * scale).to(dtype))


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy on the device with poison before and behind it."""
    out = surrounded(x.shape, x.dtype)
    return out.copy_(x)


def surrounded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of nothing but poison, which goes on before and behind it."""
    size = math.prod(shape)
    whole = torch.full((size + 2 * GUARD,), poison(dtype), dtype=dtype, device=DEV)
    return whole[GUARD : GUARD + size].view(shape)


def poison(dtype: torch.dtype) -> float:
    return math.nan if dtype.is_floating_point else -7


def is_poison(x: Tensor) -> Tensor:
    return x.isnan() if x.dtype.is_floating_point else x == -7


def around(x: Tensor) -> Tensor:
    """What lies before and behind a tensor that `surrounded` made."""
    start = x.storage_offset()
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return torch.cat([whole[:start], whole[start + x.numel() :]])


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Kernels run on DEV; what they allocate is full of poison, and no one writes past its ends."""
    allocated = []

    def allocate(shape, dtype):
        out = surrounded(tuple(shape), dtype)
        allocated.append(out.view(out.shape))  # `out` may be set to other memory
        return out

    def empty_like(x, dtype=None, **_):
        return allocate(x.shape, dtype or x.dtype)

    def empty(*shape, dtype=None, **_):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        return allocate(shape, dtype or torch.get_default_dtype())

    def new_empty(x, *shape, dtype=None, **_):
        return empty(*shape, dtype=dtype or x.dtype)

    with (
        contextlib.nullcontext() if ON_GPU else jit.interpreted(),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch.Tensor, "new_empty", new_empty),
    ):
        yield
    for x in allocated:
        assert is_poison(around(x)).all(), f"written past the ends of {tuple(x.shape)}, seed {SEED}"


def check(found: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Each row of `found` is within its type's rounding of the largest element of the row."""
    found, tolerance = found.cpu(), factor * TOLERANCE[found.dtype]
    assert found.shape == expected.shape
    allowed = tolerance * expected.abs().amax(dim=-1, keepdim=True)
    wrong = ~((found.double() - expected.double()).abs() <= allowed)  # a NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are wrong, the first at {at}: "
            f"{found[at].item()} for {expected[at].item()}; NANOVLLM_KERNEL_SEED={SEED}"
        )


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same numbers for the twin: on the CPU and in float64, which needs no tolerance."""
    return tuple(x.cpu().double() if x.dtype.is_floating_point else x.cpu() for x in tensors)


def bits(x: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()]).cpu()


def padded(x: Tensor, value: float) -> Tensor:
    """One more column: then no error is measured by less than `value`."""
    return torch.cat((x, torch.full_like(x[:, :1], value)), dim=1)


def cache_and_copy(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A cache of random numbers, and what it held."""
    cache = surrounded(shape, dtype)
    cache.copy_(torch.randn(shape))
    return cache, cache.clone()


def check_stored(cache: Tensor, before: Tensor, slots: Tensor, values: Tensor, factor=0.0) -> None:
    """Slot by slot the values, or to within rounding; bit for bit what it was everywhere else."""
    assert is_poison(around(cache)).all()
    cache, before, slots = cache.flatten(0, 1), before.flatten(0, 1), slots.cpu().long()
    kept = slots >= 0
    found, values = cache.cpu()[slots[kept]], values.cpu()[kept]
    if factor:
        check(found, values, factor)
    else:
        assert torch.equal(bits(found), bits(values))
    others = torch.ones(len(cache), dtype=torch.bool).index_fill(0, slots[kept], False)
    assert torch.equal(bits(cache)[others], bits(before)[others])


def some_slots(num_tokens: int, num_slots: int, dtype: torch.dtype) -> Tensor:
    """The last slot, the first one, -1, -1, and then any."""
    slots = torch.tensor([num_slots - 1, 0, -1, -1, *(torch.randperm(num_slots - 2) + 1).tolist()])
    return slots[:num_tokens].to(DEV, dtype)


def wide_integers(n: int) -> Tensor:
    """64-bit numbers of either sign, and the ends of 32 and 64 bits."""
    ends = [0, -1, 2**31, 2**32 - 1, 2**32, -(2**32) - 1, 2**63 - 1, -(2**63)]
    anywhere = [random_bits() for _ in range(n)]
    return torch.tensor((ends + anywhere)[:n])


def random_bits() -> int:
    high, low = torch.randint(0, 2**32, (2,)).tolist()
    return (high << 32 | low) - 2**63


class PagedBatch:
    """Texts whose keys and values lie in blocks in random order; all other slots hold NaN.

    A span (num_new, num_tokens) is a text whose last `num_new` tokens are asked for.
    """

    def __init__(
        self,
        spans: list[tuple[int, int]],
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        table_dtype: torch.dtype = torch.int32,
    ):
        self.spans, self.scale = spans, head_dim**-0.5
        self.lens = [num_tokens for _, num_tokens in spans]
        needed = [-(-num_tokens // block_size) for num_tokens in self.lens]
        # Block 0 belongs to nobody.
        order = (torch.randperm(sum(needed) + 3) + 1).tolist()
        shape = (len(order) + 1, block_size, num_kv_heads, head_dim)
        self.k_cache, self.v_cache = surrounded(shape, dtype), surrounded(shape, dtype)
        tables = torch.full((len(spans), max(needed) + 5), -1, dtype=table_dtype)
        for i, (length, num_blocks) in enumerate(zip(self.lens, needed)):
            table, order = order[:num_blocks], order[num_blocks:]
            tables[i, :num_blocks] = torch.tensor(table, dtype=table_dtype)
            for cache in (self.k_cache, self.v_cache):
                for at, block in enumerate(table):
                    part = cache[block, : length - at * block_size]
                    part.copy_(torch.randn(part.shape))
        self.tables = tables.to(DEV)[:, : max(needed) + 2]  # wider than needed, and not contiguous
        ends = torch.tensor([num_new for num_new, _ in spans]).cumsum(0)
        self.starts = [0, *ends.tolist()]
        self.q = randn(self.starts[-1], num_heads, head_dim, dtype=dtype, scale=2.0)

    @staticmethod
    def on_device(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=DEV)

    def context(self, num_decodes: int = 0, device: torch.device = DEV) -> Context:
        """The batch for `paged_attention`; its first `num_decodes` spans bring one token each."""
        return Context(
            slot_mapping=torch.zeros(len(self.q), dtype=torch.int64, device=device),
            block_tables=self.tables.long().to(device),
            context_lens=self.on_device(self.lens).to(device),
            cu_seqlens=self.on_device(self.starts).to(device),
            num_decodes=num_decodes,
            max_new=max(num_new for num_new, _ in self.spans),
        )

    def expected(self, num_decodes: int = 0) -> Tensor:
        """The twin's answer, from the same caches, NaN and all."""
        context = self.context(num_decodes, torch.device("cpu"))
        q, k_cache, v_cache = exact(self.q, self.k_cache, self.v_cache)
        return paged_attention(q, k_cache, v_cache, context, self.scale)


def decode(batch: PagedBatch, num_splits: int | None = None, order: Tensor | None = None) -> Tensor:
    """The kernel's answer; it leaves its counters zero, for the next call."""
    inputs = batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.on_device(batch.lens)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEV)
    with kernels():
        found = paged_decode_attention(*inputs, batch.scale, None, num_splits, order, counters)
    assert not counters.any()
    return found


def prefill(batch: PagedBatch) -> Tensor:
    """The kernel's answer."""
    inputs = batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.on_device(batch.lens)
    longest = max(num_new for num_new, _ in batch.spans)
    with kernels():
        return paged_prefill_attention(*inputs, batch.on_device(batch.starts), longest, batch.scale)


def draw(logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """The kernel's tokens, which are the twin's save where its two best scores all but tie."""
    with kernels():
        found = sample(guarded(logits), *(x.to(DEV) for x in (temperatures, seeds, positions)))
    found = found.cpu()
    expected = sample_torch(
        logits, SamplingTensors(temperatures, seeds, positions, all_greedy=False)
    )
    assert ((found >= 0) & (found < logits.shape[1])).all(), found
    scores = logits.float() - logits.amax(dim=-1, keepdim=True)
    scores = scores / temperatures.clamp(min=2.0**-126).unsqueeze(1)
    scores -= exponential_noise(seeds, positions, logits.shape[1]).log()
    for row in (found != expected).nonzero().flatten().tolist():
        best = scores[row].topk(2).values
        assert temperatures[row] > 0 and best[0] - best[1] < 1e-4, f"row {row} of {found}"
        assert found[row] in scores[row].topk(2).indices
    return found

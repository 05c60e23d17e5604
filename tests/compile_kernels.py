"""Compile every kernel for a GPU that need not be there; print which were compiled.

The interpreter runs kernels as Python and knows neither types nor shared memory, so it accepts
what the compiler refuses. Nor does it know registers: what a program holds beyond them goes
through memory, and a kernel that is right can take ten times as long.
Usage: compile_kernels.py COMPUTE_CAPABILITY, as 90.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import nanovllm.kernels as package
from nanovllm.kernels.add_rms_norm import add_rms_norm
from nanovllm.kernels.all_reduce import all_reduce
from nanovllm.kernels.candidates import sample_filtered_
from nanovllm.kernels.decode_attention import paged_decode_attention
from nanovllm.kernels.fixed_attention import fixed_attention, fixed_decode
from nanovllm.kernels.fixed_order import fixed_order
from nanovllm.kernels.grouped_linear import run_experts
from nanovllm.kernels.logprobs import logprobs_of
from nanovllm.kernels.norm_rope_store import norm_rope_store
from nanovllm.kernels.penalties import Penalties, penalise_
from nanovllm.kernels.prefill_attention import paged_prefill_attention
from nanovllm.kernels.resolve_tokens import resolve_tokens
from nanovllm.kernels.routing import route
from nanovllm.kernels.sample import sample
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.small_linear import linear, small_linear
from nanovllm.kernels.store_kvcache import store_kvcache

CAPABILITY = int(sys.argv[1])
MULTIPROCESSORS, SHARED_MEMORY = {80: (108, 163 << 10), 90: (132, 227 << 10)}[CAPABILITY]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MOST_SPILLED = 256  # bytes of a thread, in 16-bit types: what is seldom used may go through memory
compiled: set[str] = set()


class NoGPU:
    """As much of a driver as it takes to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


launch = JITFunction.run


def compile_only(self: JITFunction, *args, grid, warmup, **kwargs):
    """In the place of a launch."""
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    name = self.fn.__name__
    assert kernel.metadata.shared <= SHARED_MEMORY, (name, kernel.metadata.shared, kwargs)
    assert ("griddepcontrol" in kernel.asm["ptx"]) == bool(kwargs.get("launch_pdl")), name
    if CAPABILITY == 90 and kernel.hash not in measured and args[0].element_size() == 2:
        measured.add(kernel.hash)
        assert spilled(kernel) <= MOST_SPILLED, (name, spilled(kernel), kwargs)
    compiled.add(name)


measured: set[str] = set()


def spilled(kernel: triton.compiler.CompiledKernel) -> int:
    """Bytes of a thread that its registers do not hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True)
    return int(re.search(r"STACK:(\d+)", told.stdout)[1])


def pretend() -> None:
    """Launches compile, and tensors count as those of the GPU."""
    driver.set_active(NoGPU())
    JITFunction.run = compile_only
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, pretended in {
            "uses_triton": lambda x: True,
            "overlaps": lambda x: CAPABILITY >= 90,
            "is_hopper": lambda x: CAPABILITY == 90,
            "num_processors": lambda device: MULTIPROCESSORS,
        }.items():
            if hasattr(module, name):
                setattr(module, name, pretended)
        if hasattr(module, "EMPTY"):
            module.EMPTY = 1 << 20  # a batch is worth the Hopper kernel however small it is


def attention(dtype: torch.dtype, head_dim: int, group: int, block_size: int) -> None:
    """Decode at batch sizes from one sequence to so many that nothing is split; prefill, twice."""
    for batch in (1, 8, 64):
        q = torch.zeros(batch, 8 * group, head_dim, dtype=dtype)
        caches = torch.zeros(2, 4, block_size, 8, head_dim, dtype=dtype)
        tables = torch.zeros(batch, 4, dtype=torch.int32)
        lens = torch.ones(batch, dtype=torch.int32)
        paged_decode_attention(q, *caches, tables, lens, 0.1, order=lens)
        fixed_decode(q, caches.unbind(), tables, lens, lens, 0.1, torch.empty_like(q))
    starts = torch.arange(batch + 1, dtype=torch.int32)
    for max_new in (1, 512):
        paged_prefill_attention(q, *caches, tables, lens, starts, max_new, 0.1)
    for new in (1, max_new):
        fixed_attention(q, *caches, tables, lens, starts, new, 0.1, torch.empty_like(q))


def layers(dtype: torch.dtype, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
    """What lies around attention, for one token and for many."""
    for n in (1, 600):
        x, ones = torch.zeros(n, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)
        add_rms_norm(x, None, ones, 1e-6)
        add_rms_norm(x, x.clone(), ones, 1e-6)
        silu_and_mul(torch.zeros(n, 6 * hidden, dtype=dtype))
        caches = torch.zeros(2, 4, 256, kv_heads, head_dim, dtype=dtype)
        k, slots = torch.zeros(n, kv_heads, head_dim, dtype=dtype), torch.arange(n)
        store_kvcache(k, k, *caches, slots)
        qkv = torch.zeros(n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        one, angles = torch.ones(head_dim, dtype=dtype), torch.zeros(9, 2, 1, head_dim // 2)
        norm_rope_store(qkv, one, one, 1e-6, slots, angles, *caches, slots)
        norm_rope_store(qkv, None, None, 0.0, slots, angles, *caches, slots)
    for silu in (False, True):
        for size, n in product((1024, 3 * hidden), (1, 2, 16)):
            weight = torch.zeros(64, size, dtype=dtype)
            x, counters = torch.zeros(n, size, dtype=dtype), torch.zeros(4, dtype=torch.int32)
            for given in (None, counters):
                small_linear(x, weight, silu, given)
                if not silu:
                    small_linear(x, weight, silu, given, torch.zeros(64, dtype=dtype))
    ids, logits = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 5000, dtype=dtype)
    sample(logits, torch.ones(3), ids, ids)
    history, slots = torch.zeros(99, dtype=torch.int32), ids
    resolve_tokens(ids, ids, history, slots)
    for size, n in product((256, 1000), (3, 300)):
        with fixed_order(torch.zeros(9, dtype=torch.int32)):
            linear(torch.zeros(n, size, dtype=dtype), torch.zeros(70, size, dtype=dtype))
    wanted, wide = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 151_936, dtype=dtype)
    logprobs_of(logits, wanted, ids, 5)
    logprobs_of(wide, wanted, ids, 20)
    counts, tables = torch.zeros(64, 5000, dtype=torch.int32), torch.zeros(3, 4, dtype=torch.int32)
    costs = torch.ones(3), torch.ones(3), torch.ones(3)
    penalise_(logits, Penalties(history.view(11, 9), counts, tables, ids, ids, ids, *costs))
    for rows in (3, 600):
        whole, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        draw, filters = (ones, whole, whole), (whole, ones, ones)
        sample_filtered_(whole, logits[:1].repeat(rows, 1), draw, filters)


def rows_in_registers(dtype: torch.dtype) -> None:
    """Rows of matrices of published shapes, whole, and of SwiGLU two at a time."""
    for size, silu in product((2048, 3584, 4096, 5120, 12288, 18944), (False, True)):
        small_linear(torch.zeros(1, size, dtype=dtype), torch.zeros(64, size, dtype=dtype), silu)


def mixture(dtype: torch.dtype, hidden: int, size: int, number: int, top: int) -> None:
    """Routing and experts, from a single token to more than any tile takes."""
    gate_up, down = (
        torch.zeros(number, *shape, dtype=dtype) for shape in ((2 * size, hidden), (hidden, size))
    )
    for n in (1, 2, 3, 32, 256, 1024, 4096):
        x, logits = torch.zeros(n, hidden, dtype=dtype), torch.zeros(n, number, dtype=dtype)
        for norm in (False, True):
            run_experts(x, gate_up, down, *route(logits, top, norm))


def sums(dtype: torch.dtype, hidden: int, ranks: int) -> None:
    """The sum over ranks, alone and with what follows it, for few rows and for many."""
    x, ones = torch.zeros(3, hidden, dtype=dtype), torch.ones(hidden, dtype=dtype)
    inboxes, counts = torch.zeros(ranks, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    for tags in (True, False):
        all_reduce(x, inboxes, counts, counts[:1], 1, tags)
        all_reduce(x, inboxes, counts, counts[:1], 1, tags, x.clone(), ones, 1e-6)


def usual(dtype: torch.dtype) -> None:
    """Every kernel, on the shapes of models that many people run."""
    attention(dtype, head_dim=128, group=2, block_size=256)
    layers(dtype, hidden=1024, heads=16, kv_heads=8, head_dim=128)
    mixture(dtype, hidden=2048, size=768, number=128, top=8)
    sums(dtype, hidden=4096, ranks=2)


def further() -> None:
    """Other groups of heads, sizes that are no powers of two, other blocks, more ranks."""
    rows_in_registers(torch.bfloat16)
    attention(torch.bfloat16, head_dim=128, group=7, block_size=256)
    attention(torch.bfloat16, head_dim=64, group=1, block_size=16)
    attention(torch.bfloat16, head_dim=128, group=8, block_size=64)
    attention(torch.float16, head_dim=128, group=1, block_size=128)
    attention(torch.bfloat16, head_dim=64, group=8, block_size=256)
    attention(torch.float16, head_dim=64, group=2, block_size=128)
    layers(torch.bfloat16, hidden=256, heads=6, kv_heads=2, head_dim=64)
    mixture(torch.bfloat16, hidden=300, size=70, number=5, top=2)
    sums(torch.bfloat16, hidden=450, ranks=8)


if __name__ == "__main__":
    pretend()
    usual(torch.bfloat16)
    if CAPABILITY == 90:  # elsewhere the same code is compiled without what is Hopper's
        usual(torch.float32)
        further()
    print(json.dumps(sorted(compiled)))

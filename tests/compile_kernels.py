"""Compile every kernel for an H100, on a machine without a GPU.

    TRITON_INTERPRET=0 python tests/compile_kernels.py

The interpreter runs what the compiler refuses: a branch that no type fits, a name that is no
constant. So each wrapper is called with tensors that lie on the CPU, and where it would launch a
kernel, the kernel is compiled instead. Prints a line for each; the first that fails raises.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm import kernels as package
from nanovllm.kernels import (
    add_rms_norm,
    all_reduce,
    decode_attention,
    jit,
    norm_rope_store,
    prefill_attention,
    resolve_tokens,
    sample,
    silu_and_mul,
    small_linear,
    store_kvcache,
    top_k_top_p,
)

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = {"num_warps", "num_stages", "launch_pdl"}
compiled: set[tuple] = set()


def compile_instead(self: triton.JITFunction, *args, grid, warmup, **kwargs) -> None:
    """In the place of `JITFunction.run`."""
    options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
    values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(self.params):
        value = values[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    case = (self.__name__, *signature.values(), *constants.values(), *options.items())
    if case not in compiled:
        compiled.add(case)
        source = ASTSource(self, signature, constants, attributes)
        registers = triton.compile(source, target=H100, options=options).metadata
        types = ", ".join(sorted({t for t in signature.values() if t[0] == "*"}))
        print(f"{self.__name__:26}{types:28}shared memory {registers.shared}", flush=True)


def attention(dtype: torch.dtype) -> None:
    """Both kernels of attention, and what stores keys and values."""
    q, k = torch.zeros(4, 16, 128, dtype=dtype), torch.zeros(4, 8, 128, dtype=dtype)
    caches = [torch.zeros(2, 256, 8, 128, dtype=dtype) for _ in "kv"]
    tables, lens = torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    slots = torch.zeros(4, dtype=torch.int64)
    for splits in (1, 4, 32):
        decode_attention.paged_decode_attention(q, *caches, tables, lens, 0.1, None, splits, lens)
    prefill_attention.paged_prefill_attention(q, *caches, tables, lens, lens, 4, 0.1)
    store_kvcache.store_kvcache(k, k, *caches, slots)
    weight, turns = torch.zeros(128, dtype=dtype), torch.zeros(8, 2, 1, 64)
    for num_tokens in (4, 600):
        qkv, at = torch.zeros(num_tokens, 32 * 128, dtype=dtype), slots.repeat(150)[:num_tokens]
        for norm in (weight, None):
            norm_rope_store.norm_rope_store(qkv, norm, norm, 1e-6, at, turns, *caches, at)


def the_rest(dtype: torch.dtype) -> None:
    """Norms, sums, products and sampling."""
    x, weight = torch.zeros(3, 1024, dtype=dtype), torch.zeros(1024, dtype=dtype)
    for residual in (x, None):
        add_rms_norm.add_rms_norm(x, residual, weight, 1e-6)
    inboxes, counts = torch.zeros(2, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    for tags in (True, False):
        for norm in ((x, weight, 1e-6), ()):
            all_reduce.all_reduce(x, inboxes, counts, counts[:1], 1, tags, *norm)
    silu_and_mul.silu_and_mul(x)
    for silu in (False, True):
        small_linear.small_linear(x, x.repeat(2, 1), silu)
    ids, heat = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    logits = torch.zeros(3, 5000, dtype=dtype)
    sample.sample(logits, heat, ids, ids)
    for rows in (1, 4):  # few, and more than the interpreter has multiprocessors
        many = logits.repeat(rows, 1), heat.repeat(rows), ids.repeat(rows), heat.repeat(rows)
        top_k_top_p.keep_top_k_top_p_(*many)
    resolve_tokens.resolve_tokens(ids, ids)


def main() -> None:
    """All kernels, in the types that models have."""
    modules = [m for m in vars(package).values() if isinstance(m, ModuleType)]
    jit._interpreted = True  # kernels take tensors on the CPU
    for module in modules:
        if hasattr(module, "overlaps"):
            vars(module)["overlaps"] = lambda x: True  # as on an H100
    with mock.patch.object(triton.JITFunction, "run", compile_instead):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            attention(dtype)
            the_rest(dtype)
    defined = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    missing = defined - {name for name, *_ in compiled}
    assert not missing, f"never compiled: {missing}"
    print(f"{len(compiled)} variants of {len(defined)} kernels")


if __name__ == "__main__":
    main()

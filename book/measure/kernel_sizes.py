"""How many rows, and how many parts, the registers hold: `python book/measure/kernel_sizes.py`.

Two kernels keep in registers what they work on: `small_linear_kernel` rows of weights, the end of
`decode_kernel` parts of a context. Tries sizes of both for published shapes on a GPU, in bfloat16,
and prints one JSON object a line; book/measure/kernel_sizes.jsonl has what it printed on an H200.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[2] / "chapters"))
from nanovllm.kernels.attention_tile import LOG2_E
from nanovllm.kernels.decode_attention import (
    decode_kernel,
    paged_decode_attention,
    room_for_parts,
    splits_for,
)
from nanovllm.kernels.small_linear import small_linear, small_linear_kernel
from nanovllm.workloads import SHAPES
from timing import seconds

BEYOND_CACHES = 300e6  # bytes of weights that no cache of the chip holds
CONTEXTS = (1, 1000), (1, 4000), (8, 1000)  # sequences, and tokens of each


def say(**row: object) -> None:
    """A line of the table."""
    print(json.dumps({"device": torch.cuda.get_device_name().removeprefix("NVIDIA "), **row}))
    sys.stdout.flush()


def random(*shape: int) -> torch.Tensor:
    """A tensor of the kernels' kind."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def rows_of(name: str, num_rows: int, size: int, silu: bool) -> None:
    """Microseconds of a matrix with one vector, by rows and warps of a program."""
    copies = max(2, int(BEYOND_CACHES // (2 * num_rows * size)) + 1)
    weights, x = [random(num_rows, size) for _ in range(copies)], random(1, size)
    outputs, padded = num_rows // (2 if silu else 1), triton.next_power_of_2(size)
    out = x.new_empty(1, outputs)

    def run(block: int, warps: int, i: int) -> None:
        small_linear_kernel[triton.cdiv(outputs, block),](
            out, x, weights[i], out, 1, outputs, SIZE=size, PADDED=padded, BLOCK=block, SILU=silu,
            BIAS=False, PDL=True, launch_pdl=True, num_warps=warps,
        )  # fmt: skip

    found, want = {}, small_linear(x, weights[0], silu)
    for block in (1, 2, 4):
        for warps in (4, 8, 16):
            if 8 <= padded * block * (1 + silu) // (64 * warps) <= 256:
                run(block, warps, 0)
                assert torch.allclose(out, want, atol=2e-2, rtol=2e-2)
                took = seconds(partial(run, block, warps), copies)
                found[f"{block} x {warps}"] = round(1e6 * took, 1)
    chosen = seconds(lambda i: small_linear(x, weights[i], silu), copies)
    say(kernel="small_linear", matrix=name, rows_by_warps=found, chosen=round(1e6 * chosen, 1))


def parts_of(shape: str, batch: int, length: int) -> None:
    """Microseconds of attention to so many texts, by how many parts are joined at a time."""
    config = SHAPES[shape]
    kv_heads, dim = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // kv_heads
    blocks, rows = -(-length // 256), batch * kv_heads
    q, (k, v) = random(batch, kv_heads * group, dim), random(2, batch * blocks, 256, kv_heads, dim)
    tables = torch.arange(batch * blocks, device="cuda", dtype=torch.int32).view(batch, blocks)
    lens = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    counters, out = torch.zeros(rows, device="cuda", dtype=torch.int32), torch.empty_like(q)
    splits, padded = splits_for(rows, q.device), triton.next_power_of_2(group)
    tile, stages = (64, 3) if splits <= 4 else (32, 2)

    def run(parts: int, _: int) -> None:
        room = *room_for_parts(q, splits, rows, group, counters)[:2], counters
        decode_kernel[rows, splits](
            out, *room, q, k, v, tables, lens, lens, dim**-0.5 * LOG2_E, tables.stride(0), splits,
            BLOCK_SIZE=256, NUM_KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=dim, ROWS=max(16, padded),
            GROUP_ROWS=padded, TILE=tile, IS_SPLIT=True, IS_ORDERED=False, PARTS=parts, PDL=True,
            launch_pdl=True, num_warps=2, num_stages=stages,
        )  # fmt: skip

    given = q, k, v, tables, lens, dim**-0.5
    found, want = {}, paged_decode_attention(*given, counters=counters)
    for parts in (4, 8, 16, 32):
        run(parts, 0)
        assert torch.allclose(out, want, atol=2e-2, rtol=2e-2)
        found[parts] = round(1e6 * seconds(partial(run, parts)), 1)
    chosen = seconds(lambda i: paged_decode_attention(*given, counters=counters))
    about = dict(shape=shape, sequences=batch, tokens=length, splits=splits)
    say(kernel="decode", **about, parts_at_a_time=found, chosen=round(1e6 * chosen, 1))


DENSE = "qwen3-0.6b", "llama-3.2-1b", "qwen3-8b", "qwen2.5-7b", "qwen3-32b"


def main() -> None:
    """All sizes of the shapes that are named, or of all."""
    shapes = sys.argv[1:] or (*DENSE, "qwen3-30b-a3b")
    for shape in shapes:
        for context in CONTEXTS:
            parts_of(shape, *context)
    for shape in shapes:
        hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
        if shape in DENSE:
            rows_of(f"{shape}, gate and up", 2 * inner, hidden, silu=True)
            rows_of(f"{shape}, down", hidden, inner, silu=False)


if __name__ == "__main__":
    main()

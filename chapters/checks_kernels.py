"""The exercises of chapters 6 and 7, as checks.

What launches kernels does so on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from checks import Wrong, exercise, near

# ---- Chapter 6 ----


@exercise
def join(rule: Callable[[tuple, tuple], tuple]) -> None:
    """`rule((m1, l1, o1), (m2, l2, o2))` -> (m, l, o), the o not yet divided by l."""

    def part(scores: list[float], values: list[float]) -> tuple[float, float, float]:
        m = max(scores, default=-math.inf)
        weights = [math.exp(s - m) for s in scores]
        return m, sum(weights), sum(w * v for w, v in zip(weights, values))

    scores, values = [0.5, 3.0, -2.0, 40.0, 1.0], [1.0, -2.0, 0.25, 4.0, 8.0]
    for cut in range(len(scores) + 1):
        parts = part(scores[:cut], values[:cut]), part(scores[cut:], values[cut:])
        try:
            found = rule(*parts)
            assert len(found) == 3
        except Exception as error:
            raise Wrong(f"of {parts[0]} and {parts[1]} it makes no (m, l, o): {error!r}") from error
        for name, one, other in zip("mlo", found, part(scores, values), strict=True):
            if not math.isclose(one, other, rel_tol=1e-6):
                what = "an empty part and five tokens" if cut in (0, 5) else f"{cut} and {5 - cut}"
                raise Wrong(f"joining {what}: {name} is {one}, and of all tokens {other}")


@exercise
def parts(started: float, working: float, joining: float) -> None:
    """Programs of decode attention over 150 and 40 tokens, in at most four parts."""
    import torch

    from nanovllm.kernels.decode_attention import launch_decode, room_for_parts

    device, lens, heads, splits = where(), [150, 40], 2, 4
    caches = [torch.zeros(1, 256, heads, 16, device=device) for _ in range(2)]
    q, tables = torch.zeros(2, heads, 16, device=device), torch.zeros(2, 1, device=device).int()
    room = room_for_parts(q, splits, 2 * heads, 1, None)
    out, context_lens = torch.full_like(q, torch.nan), torch.tensor(lens, device=device).int()
    room[1].fill_(torch.nan)  # the parts' weights: who has written one had tokens
    launch_decode(out, room, q, (caches[0], caches[1]), tables, context_lens, None, 1.0, splits)
    near("started", started, 2 * heads * splits, "one for each sequence, key head and part", 0)
    wrote = int(room[1].isfinite().sum())
    near("working", working, wrote, "five tiles in parts of two, and two tiles in parts of one", 0)
    joined = int(out.isfinite().any(-1).sum())
    near("joining", joining, joined, "the last one of each sequence and key head", 0)


@exercise
def window(kernel: Any) -> None:
    """`kernel` is `tile_by_tile` with one more constant, WINDOW, and NaN lies around the window."""
    import torch

    lens, heads, size, block = [1, 5, 17, 40, 70], 2, 16, 16
    device, width = where(), -(-max(lens) // block)
    torch.manual_seed(0)
    k, v = torch.randn(2, len(lens) * width * block, heads, size, device=device)
    tables = torch.randperm(len(lens) * width, device=device).int().view(len(lens), width)
    slots = (tables.long()[:, :, None] * block + torch.arange(block, device=device)).flatten(1)
    q = torch.randn(len(lens), 2 * heads, size, device=device)
    context_lens = torch.tensor(lens, device=device).int()
    for most in (1, 5, 16, 30, 100):
        caches, expected = torch.full_like(torch.stack((k, v)), torch.nan), []
        for row, seen in enumerate(slots[i, max(0, n - most) : n] for i, n in enumerate(lens)):
            caches[0, seen], caches[1, seen] = k[seen], v[seen]
            keys, values = (x[seen].repeat_interleave(2, dim=1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[row], keys) * size**-0.5
            expected.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values))
        out, constants = torch.full_like(q, torch.nan), dict(BLOCK_SIZE=block, TILE=16)
        constants |= dict(NUM_KV_HEADS=heads, GROUP=2, HEAD_DIM=size, WINDOW=most)
        scale = size**-0.5 * math.log2(math.e)
        launched(kernel, (len(lens), 2 * heads), out, q, *caches, tables, context_lens, scale,
                 width, **constants)  # fmt: skip
        for n, found, right in zip(lens, out, torch.stack(expected), strict=True):
            what = f"text length {n}, WINDOW={most}: the output is not"
            if not found.isfinite().all():
                why = "something outside of the window was read, or all of a tile was masked"
                raise Wrong(f"{what} finite: {why}")
            if not torch.allclose(found, right, atol=1e-4):
                raise Wrong(f"{what} that of the newest {min(n, most)} tokens")


def where() -> Any:
    """The device that kernels run on here."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def launched(kernel: Any, grid: tuple[int, int], *args: Any, **constants: Any) -> None:
    """Launch a kernel; Wrong where it can't be launched so."""
    try:
        kernel[grid](*args, **constants)
    except Exception as error:
        raise Wrong(f"the kernel makes no output: {error!r}") from error


# ---- Chapter 7 ----


@exercise
def fused_bytes(before: float, after: float) -> None:
    """Bytes of a token."""
    near("before", before, 128 * 256, "48 heads for the norms, 48 for the turns, 32 for the copies")
    near("after", after, 64 * 256, "32 heads are read, and as many written")


@exercise
def candidates(rule: Callable[[Any, int, int], Any]) -> None:
    """`rule(logits, k, width)` -> the columns that can be among the k likeliest, as numbers."""
    import torch

    torch.manual_seed(0)
    rows = {
        "a row": torch.randn(1000),
        "a row whose last part is shorter, all of it below 0": torch.randn(70) - 9,
        "a row with equal logits": torch.randn(600).bfloat16().float(),
        "a row whose maxima are equal": torch.randn(600).round(),
        "a row with parts that are all -inf": torch.randn(400).index_fill(
            0, torch.arange(64, 320), -torch.inf
        ),
    }
    for name, logits in rows.items():
        for k, width in ((1, 16), (5, 16), (7, 32), (40, 32)):
            maxima = sorted((float(part.max()) for part in logits.split(width)), reverse=True)
            least = maxima[k - 1] if k <= len(maxima) else -math.inf
            right = set((logits >= least).nonzero().flatten().tolist())
            try:
                found = {int(column) for column in rule(logits.clone(), k, width)}
            except Exception as error:
                raise Wrong(f"of {name} it makes no list of columns: {error!r}") from error
            if missing := set(logits.topk(k).indices.tolist()) - found:
                raise Wrong(f"{name}, k={k}: {missing} can win, and is not among the candidates")
            if found != right:
                what = f"{name}, {len(maxima)} parts, k={k}: the number of candidates is"
                raise Wrong(f"{what} not {len(found)} but {len(right)}")


@exercise
def gelu(kernel: Any) -> None:
    """`kernel` has the arguments out, gate_up, size and BLOCK."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    for num_tokens, size in ((1, 7), (3, 64), (2, 150)):
        gate_up = 2 * torch.randn(num_tokens, 2 * size, device=where())
        gate_up[0, 1] = 90.0
        memory = torch.full((num_tokens * size + 64,), torch.nan, device=where())
        grid = num_tokens, -(-size // 64)
        launched(kernel, grid, memory, gate_up, size, BLOCK=64)
        out, behind = memory[:-64].view(num_tokens, size), memory[-64:]
        gate, up = gate_up.chunk(2, dim=-1)
        what = f"of {num_tokens} tokens of {size} channels the output is not"
        if not out.isfinite().all():
            raise Wrong(f"{what} finite everywhere (one gate is 90)")
        if not torch.allclose(out, F.gelu(gate, approximate="tanh") * up, atol=1e-4, rtol=1e-4):
            raise Wrong(f"{what} gelu(gate) * up")
        if not behind.isnan().all():
            raise Wrong(f"{what} all that is written: something lies behind its end")


@exercise
def stream() -> None:
    """An engine whose norm sees the sum before it is rounded."""
    from contextlib import nullcontext

    import torch
    import torch.nn.functional as F

    from nanovllm.kernels.add_rms_norm import add_rms_norm, add_rms_norm_torch
    from nanovllm.kernels.jit import interpreted

    torch.manual_seed(0)
    x, residual = torch.randn(2, 16, 96, device=where()).half()  # which the interpreter rounds well
    weight = torch.rand(96, device=where()).half()
    exact = F.rms_norm(x.float() + residual.float(), (96,), weight.float(), 1e-6).half()
    for name, way in (("the twin", add_rms_norm_torch), ("the kernel", add_rms_norm)):
        with nullcontext() if x.is_cuda else interpreted():
            out, total = way(x, residual, weight, 1e-6)
        if not torch.equal(total, x + residual):
            raise Wrong(f"{name}: the stream itself is rounded as before")
        if out.dtype != x.dtype or (out != exact).float().mean() > 0.02:
            raise Wrong(f"{name}: what it normalises is not the sum before it is rounded")

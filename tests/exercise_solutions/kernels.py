"""Chapters 6 to 9."""

import torch
import torch.nn.functional as F

from nanovllm.kernels.jit import tl, triton


def joined(a: tuple, b: tuple) -> tuple:
    """The rule of chapter 6."""
    from math import exp

    m = max(a[0], b[0])
    return m, *(x * exp(a[0] - m) + y * exp(b[0] - m) for x, y in zip(a[1:], b[1:]))


@triton.jit
def windowed(
    out, q, k_cache, v_cache, block_tables, context_lens, scale, table_stride,
    BLOCK_SIZE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Chapter 6's `tile_by_tile`, for the newest WINDOW tokens."""
    seq, head, channel = tl.program_id(0), tl.program_id(1), tl.arange(0, HEAD_DIM)
    row = (seq * NUM_KV_HEADS * GROUP + head) * HEAD_DIM + channel
    query, context_len = tl.load(q + row).to(tl.float32), tl.load(context_lens + seq)
    best, total, mean = -float("inf"), 0.0, tl.zeros([HEAD_DIM], tl.float32)
    begin = tl.maximum(context_len - WINDOW, 0)
    for first in range(begin, context_len, TILE):
        at = first + tl.arange(0, TILE)
        there = at < context_len
        table = block_tables + seq * table_stride
        block = tl.load(table + at // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + at % BLOCK_SIZE
        where = (slot[:, None] * NUM_KV_HEADS + head // GROUP) * HEAD_DIM + channel[None, :]
        keys = tl.load(k_cache + where, mask=there[:, None], other=0.0)
        values = tl.load(v_cache + where, mask=there[:, None], other=0.0)
        scores = tl.where(there, tl.sum(query * keys, axis=1) * scale, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=0))
        shrink, probs = tl.exp2(best - new_best), tl.exp2(scores - new_best)
        total = total * shrink + tl.sum(probs, axis=0)
        mean = mean * shrink + tl.sum(probs[:, None] * values, axis=0)
        best = new_best
    tl.store(out + row, (mean / total).to(out.dtype.element_ty))


def likely(logits: torch.Tensor, k: int, width: int) -> torch.Tensor:
    """The columns that can be among the k likeliest, by the parts' highest logits."""
    maxima = F.pad(logits, (0, -len(logits) % width), value=-torch.inf).view(-1, width).amax(1)
    least = maxima.topk(k).values[-1] if k <= len(maxima) else -torch.inf
    return (logits >= least).nonzero().flatten()


@triton.jit
def gelu_and_mul(out, gate_up, size, BLOCK: tl.constexpr):
    """gelu(gate) * up: one program a token and BLOCK channels."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    gate = tl.load(gate_up + token * 2 * size + at, mask=there).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * size + at, mask=there).to(tl.float32)
    gelu = gate * tl.sigmoid(1.5957691 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + token * size + at, (gelu * up).to(out.dtype.element_ty), mask=there)


def without_decision(x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> None:
    """Chapter 8's step, where the device decides."""
    y.copy_(torch.where(factor > 0, x * factor, 0.0))


ANSWERS: dict[str, dict] = {
    "join": dict(rule=joined),
    "parts": dict(started=16, working=10, joining=4),
    "window": dict(kernel=windowed),
    "fused-bytes": dict(before=32_768, after=16_384),
    "candidates": dict(rule=likely),
    "gelu": dict(kernel=gelu_and_mul),
    "frozen": dict(step=without_decision),
    "sizes": dict(padded_now=144, padded=256, graphs=10),
    "known-lengths": dict(wasted=0, wasted_with_stop=0, wasted_at_fifth=1),
}

CELLS: dict[str, list[str]] = {  # exercise -> the export cells of a solution
    "stream": [
        '''#| export: nanovllm/kernels/add_rms_norm.py
import torch
import torch.nn.functional as F

from nanovllm.kernels.jit import tl, triton, wait_for_inputs


@triton.jit
def add_rms_norm_kernel(
    out, total, x, residual, weight, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    there = at < SIZE
    scale = tl.load(weight + at, mask=there).to(tl.float32)
    wait_for_inputs(PDL)
    stream = tl.load(x + token * SIZE + at, mask=there, other=0.0).to(tl.float32)
    if ADD:
        stream += tl.load(residual + token * SIZE + at, mask=there, other=0.0).to(tl.float32)
        tl.store(total + token * SIZE + at, stream.to(total.dtype.element_ty), mask=there)
    stream *= tl.rsqrt(tl.sum(stream * stream, axis=0) / SIZE + eps)
    tl.store(out + token * SIZE + at, (stream * scale).to(out.dtype.element_ty), mask=there)


def add_rms_norm_torch(x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    exact = x.float() if residual is None else x.float() + residual.float()
    out = F.rms_norm(exact, weight.shape, weight.float(), eps).to(x.dtype)
    return out, x if residual is None else x + residual
''',
    ],
    "powers-of-two": [
        '''#| export: nanovllm/engine/graphs.py
def graph_shapes(max_num_tokens: int, max_num_seqs: int) -> list[Shape]:
    """The shapes of steps that are recorded, small ones first."""
    most = 1 << (max_num_seqs - 1).bit_length()
    shapes = [Shape(n, n, n) for n in (1 << i for i in range(most.bit_length()))]
    shapes += [Shape(n, MAX_PROMPTS, 0) for n in PROMPT_SIZES if n <= max_num_tokens]
    for rows in (*(n for n in MIXED_DECODES if n < most), most):
        mixed = [n for n in MIXED_SIZES if n <= max_num_tokens]
        shapes += [Shape(rows + n, rows + MAX_PROMPTS, rows) for n in mixed]
    return sorted(shapes)
''',
    ],
    "dropped": [
        '''#| export: nanovllm/engine/pipeline.py
from nanovllm.engine.sequence import Sequence


class Pipeline(Pipeline):
    num_dropped = 0  # rows whose token nobody wanted

    def pop(self) -> tuple[list[Sequence], list[int | None]]:
        """The oldest step's sequences, and the token that each gains by it."""
        step = self.steps.popleft()
        rows = zip(step.seqs, step.result.token_ids(), step.grows, strict=True)
        gains = [t if grows and not seq.is_finished else None for seq, t, grows in rows]
        self.num_dropped += sum(step.grows) - sum(gain is not None for gain in gains)
        return step.seqs, gains

    def forget(self) -> None:
        """What still runs is for nobody."""
        self.num_dropped += sum(sum(step.grows) for step in self.steps)
        self.steps.clear()
''',
    ],
    "depth-three": [
        '''#| export: nanovllm/config.py
class Config(Config):
    @property
    def max_in_flight(self) -> int:
        """How many steps may have been launched and not been accounted for."""
        return 3
''',
        '''#| export: nanovllm/engine/scheduler.py
class Scheduler(Scheduler):
    def can_admit(self) -> bool:
        """May the head of the queue start? Its tokens are known, and there are blocks for them."""
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        if self.waiting[0].num_pending_tokens > 0:
            return False
        reserve = self.num_blocks // 100 if self.running else 0
        return self.block_manager.can_allocate(self.waiting[0], reserve)
''',
    ],
}

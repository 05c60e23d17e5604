"""Draw the book's diagrams: `python book/figures/diagrams.py` writes the pictures here.

Those of chapters 1 and 2 are here, those of chapters 3 to 5 in diagrams_blocks.py,
those of chapters 6 to 9 in diagrams_kernels.py, that of chapter 10 in diagrams_parallel.py.
"""

from __future__ import annotations

from math import cos, degrees, sin

from matplotlib.axes import Axes
from matplotlib.patches import Arc, Circle, Rectangle

import diagrams_blocks
import diagrams_kernels
import diagrams_parallel
import diagrams_serving
from drawing import (
    INK,
    KEPT,
    KEPT_LINE,
    NEUTRAL,
    NOW,
    PALE,
    PAPER,
    SMALL,
    SOFT,
    WASTED,
    WHITE,
    WIDTH,
    arrow,
    box,
    canvas,
    cells,
    chain,
    label,
    legend,
    line,
    save,
)

# the bundled model, nanovllm/tiny/config.json
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROPE_THETA = 8, 4, 64, 10_000.0


def decode_loop(height: int = 900) -> Axes:
    """One step of the loop: tokens in, the decoder layers, one token out, and back."""
    ax, at, width = canvas(height), 154, 216
    label(ax, at, 24, "token_ids", bold=True)
    cells(ax, at - 90, 40, [NEUTRAL] * 5 + [NOW], 30)
    ends = [(112, "embed_tokens", "1536 × 256"), (224, "decoder layer", "× 5"), (336, "norm", "")]
    ends += [(418, "last row only", ""), (506, "lm_head", "256 → 1536")]
    chain(ax, at, width, NEUTRAL, 70, ends, 608)
    chain(ax, at, width, WHITE, 608, [(608, "logits", "[vocab_size] = [1536]")], 706)
    chain(ax, at, width, NEUTRAL, 706, [(706, "sampler", "")], 790)
    shapes = {90: "[num_tokens]", 193: "[num_tokens,\n hidden_size]", 305: "same shape"}
    for y, shape in {**shapes, 479: "[1, hidden_size]"}.items():
        label(ax, at + 12, y, shape, SMALL, SOFT, ha="left")
    cells(ax, at - 15, 790, [NOW], 30)
    label(ax, at + 26, 805, "next token", bold=True, ha="left")
    arrow(ax, (at - 15, 805), (18, 805), (18, 55), (at - 92, 55), color=NOW, width=3)
    label(ax, 33, 440, "append", turned=True)
    line(ax, (at + width / 2, 228), (352, 20))
    line(ax, (at + width / 2, 272), (352, 844))
    decoder_layer(ax, 352, 332)
    note = "Numbers: the bundled model. Attention alone mixes tokens; all else runs row by row."
    label(ax, WIDTH / 2, 878, note, SMALL, SOFT)
    return ax


def decoder_layer(ax: Axes, x: float, width: float) -> None:
    """The panel that opens one layer up."""
    at, skip, wide, kv = x + 140, x + width - 20, 246, "→ 4 × 64"
    box(ax, x, 14, width, 836, fill=PAPER, edge=PALE)
    label(ax, x + 14, 36, "decoder layer", bold=True, ha="left")
    label(ax, skip + 8, 36, "[num_tokens, 256]", 14, SOFT, ha="right")
    chain(ax, at, wide, WHITE, 50, [(84, "input_layernorm", "")], 0)
    for left, name, note in ((at - 84, "q", "→ 8 × 64"), (at, "k", kv)):
        parts = [(142, f"{name}_proj", note), (214, f"{name}_norm", ""), (268, "RoPE", "")]
        chain(ax, left, 78, WHITE, 120, parts, 324)
    chain(ax, at + 84, 78, WHITE, 120, [(142, "v_proj", kv)], 324)
    out = [(324, "attention", ""), (378, "o_proj", "512 → 256")]
    chain(ax, at, wide, WHITE, 324, out, 442)
    chain(ax, at, wide, WHITE, 464, [(502, "post_attention_layernorm", "")], 0)
    gate = [(560, "gate_proj", "256 → 384"), (632, "SiLU", "")]
    chain(ax, at - 63, 118, WHITE, 538, gate, 690)
    chain(ax, at + 63, 118, WHITE, 538, [(560, "up_proj", "256 → 384")], 690)
    out = [(690, "SiLU(gate) · up", ""), (746, "down_proj", "384 → 256")]
    chain(ax, at, wide, WHITE, 690, out, 810)
    # the residual stream passes each half by
    for start, end, name in ((64, 454, "self_attn"), (482, 822, "mlp")):
        arrow(ax, (at, start), (skip, start), (skip, end), (at + 13, end))
        ax.add_patch(Circle((at, end), 12, facecolor=NEUTRAL, edgecolor=SOFT))
        label(ax, at, end, "+", 20)
        label(ax, at - 20, end, "residual", SMALL, SOFT, ha="right")
        label(ax, skip - 22, (start + end) / 2 + 20, name, bold=True, turned=True)
    arrow(ax, (at, 834), (at, 850))


def gqa(height: int = 330) -> Axes:
    """Pairs of query heads share a key/value head."""
    ax, x, pitch, group = canvas(height), 128, 71, NUM_HEADS // NUM_KV_HEADS
    label(ax, 14, 50, "query\nheads", ha="left", bold=True)
    label(ax, 14, 201, "key/value\nheads", ha="left", bold=True)
    for head in range(NUM_HEADS):
        centre = x + (head + 0.5) * pitch
        box(ax, centre - 28, 26, 56, 48, f"q{head}", NOW)
        pair = x + (head // group + 0.5) * group * pitch
        line(ax, (centre, 74), (pair + (centre - pair) * 0.35, 164), color=SOFT, width=2)
    for head in range(NUM_KV_HEADS):
        centre = x + (head + 0.5) * group * pitch
        box(ax, centre - 58, 164, 116, 34, f"k{head}", KEPT)
        box(ax, centre - 58, 204, 116, 34, f"v{head}", KEPT)
    text = "num_kv_heads / num_heads = 4 / 8:\nhalf the keys and values of multi-head attention"
    label(ax, WIDTH / 2, 284, text)
    return ax


def naive_recompute(height: int = 356) -> Axes:
    """Every step runs every token again."""
    ax = canvas(height)
    x, y, size, prompt, steps = 104, 66, 40, 4, 6
    for position in range(prompt + steps - 1):
        label(ax, x + (position + 0.5) * size, y - 14, str(position), SMALL, SOFT)
    label(ax, x + 4.5 * size, 20, "position")
    label(ax, 590, 20, "tokens run")
    for step in range(steps):
        num_tokens, top = prompt + step, y + step * size
        label(ax, 14, top + size / 2, f"step {step + 1}", ha="left")
        fills = [NOW] * prompt if step == 0 else [WASTED] * (num_tokens - 1) + [NOW]
        cells(ax, x, top, fills, size)
        label(ax, 540, top + size / 2, str(num_tokens), ha="right", bold=True)
        text = "the prompt" if step == 0 else f"1 new + {num_tokens - 1} again"
        label(ax, 556, top + size / 2, text, SMALL, SOFT, ha="left")
    end = y + steps * size
    line(ax, (512, end + 6), (686, end + 6), color=SOFT)
    label(ax, 540, end + 26, str(sum(range(prompt, prompt + steps))), ha="right", bold=True)
    label(ax, 556, end + 26, f"for {prompt + steps - 1} tokens", SMALL, ha="left", bold=True)
    legend(ax, x, end + 28, NOW, "new")
    legend(ax, x + 90, end + 28, WASTED, "recomputed")
    return ax


def prefill_decode(height: int = 522) -> Axes:
    """The same weights serve num_tokens tokens in prefill, and one in decode."""
    ax, size, prompt = canvas(height), 22, 5

    def panel(top: float, title: str, kind: str, num_rows: int, num: str) -> None:
        label(ax, 14, top, title, 19, ha="left", bold=True)
        label(ax, 686, top, kind, ha="right")
        middle, s = top + 84, "s" if num_rows > 1 else ""
        for x in (34, 332):
            for row in range(num_rows):
                cells(ax, x, middle + (row - num_rows / 2) * size, [NOW] * 4, size)
        below = middle + num_rows * size / 2 + 20
        label(ax, 14, below, f"[{num}, hidden_size]", SMALL, SOFT, ha="left")
        label(ax, 147, middle, "×", 24)
        box(ax, 172, middle - 55, 110, 110, "weights")
        label(ax, 307, middle, "=", 24)
        label(ax, 14, top + 188, f"Each weight is read once, used for {num} token{s}.", ha="left")

    def cache(top: float, fills: list[str], what: str) -> None:
        label(ax, 576, top + 46, "KV cache", bold=True)
        cells(ax, 472, top + 64, fills + [WHITE] * (8 - len(fills)), 26, 40)
        label(ax, 576, top + 134, what, SMALL)
        arrow(ax, (424, top + 78), (468, top + 78), color=NOW, width=2.4)

    panel(26, "Prefill: the whole prompt", "matrix × matrix", prompt, "num_tokens")
    cache(26, [NOW] * prompt, "writes num_tokens\nkeys and values")
    line(ax, (14, 240), (686, 240))
    panel(270, "Decode: the newest token", "matrix × vector", 1, "1")
    cache(270, [KEPT] * prompt + [NOW], "appends 1 key and value,\nreads all of them")
    arrow(ax, (468, 364), (424, 364), color=KEPT_LINE, width=2.4)
    legend(ax, 14, 498, NOW, "computed in this step")
    legend(ax, 234, 498, KEPT, "kept from before")
    return ax


def cache_rows(page: int = 470) -> Axes:
    """A contiguous cache: a row a sequence, as long as the longest may become."""
    ax = canvas(page)
    x, y, width, height, row_len, max_tokens = 96, 96, 49, 44, 12, 6
    # prompt length, length at this step (the cell being written is the last), finished
    rows = [(6, 9, False), (3, 6, False), (4, 6, True), (2, 5, False)]
    label(ax, x + 6 * width, 20, "row_len = longest prompt + max_tokens = 6 + 6")
    arrow(ax, (x + 6 * width, 42), (x + 2, 42))
    arrow(ax, (x + 6 * width, 42), (x + 12 * width - 2, 42))
    label(ax, 88, y - 18, "position", SMALL, SOFT, ha="right")
    for position in range(row_len):
        label(ax, x + (position + 0.5) * width, y - 18, str(position), SMALL, SOFT)
    slot_mapping, num_used = [], 0
    for row, (prompt, length, is_finished) in enumerate(rows):
        top = y + row * height
        label(ax, 88, top + 22 - (9 if is_finished else 0), f"row {row}", ha="right")
        fills = [KEPT] * (length - 1) + [NOW] + [WHITE] * (prompt + max_tokens - length)
        fills = [WASTED] * row_len if is_finished else fills + [WASTED] * (row_len - len(fills))
        slots = list(range(row * row_len, (row + 1) * row_len))
        cells(ax, x, top, fills, width, height, [str(slot) for slot in slots])
        if is_finished:
            label(ax, 88, top + 33, "finished", 14, ha="right")
            # it still runs, and writes the same slot at every step
            corner = (x + (length - 1) * width + 3, top + 3)
            style = {"fill": False, "edgecolor": NOW, "linewidth": 4}
            ax.add_patch(Rectangle(corner, width - 6, height - 6, **style))
        end = x + prompt * width  # between prompt and completion
        line(ax, (end, top), (end, top + height), color=INK, width=3)
        slot_mapping.append(slots[length - 1])
        num_used += 0 if is_finished else length
    bottom = y + len(rows) * height
    legend(ax, 96, bottom + 30, KEPT, "kept: prompt | generated")
    legend(ax, 332, bottom + 30, NOW, "written in this step")
    legend(ax, 96, bottom + 60, WHITE, "reserved, not used yet")
    legend(ax, 332, bottom + 60, WASTED, "wasted: finished, or out of reach")
    label(ax, 14, bottom + 104, "slot = row × row_len + position", ha="left")
    label(ax, 14, bottom + 136, f"slot_mapping = {slot_mapping}", ha="left", bold=True)
    text = f"{num_used} of {len(rows) * row_len} slots serve a running sequence"
    label(ax, 14, bottom + 168, text, ha="left")
    return ax


def rope(height: int = 626, radius: float = 84) -> Axes:
    """Positions are angles; differences of positions are differences of angles."""
    ax = canvas(height)

    def hand(cx: float, cy: float, angle: float, text: str, color: str = SOFT) -> None:
        dx, dy = cos(angle), -sin(angle)
        arrow(ax, (cx, cy), (cx + radius * dx, cy + radius * dy), color=color, width=2.6)
        label(ax, cx + (radius + 15) * dx, cy + (radius + 15) * dy, text, SMALL)

    label(ax, WIDTH / 2, 22, "One channel pair of one head, at positions 0, 1, 2, 3", bold=True)
    thetas = [ROPE_THETA ** (-2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)]
    for cx, pair, speed in zip((122, 350, 578), (0, 3, 6), ("fast", "middle", "slow")):
        ax.add_patch(Circle((cx, 150), radius, facecolor=PAPER, edgecolor=PALE))
        for position in range(4):
            hand(cx, 150, position * thetas[pair], str(position), NOW if position == 3 else SOFT)
        label(ax, cx, 262, f"{speed}: pair {pair}", bold=True)
        label(ax, cx, 286, f"θ = {thetas[pair]:.2f}: {degrees(thetas[pair]):.0f}° a token", SMALL)
    text = f"… and the slowest, pair {len(thetas) - 1}: {degrees(thetas[-1]):.3f}° a token"
    label(ax, WIDTH / 2, 316, text, SMALL)
    line(ax, (14, 340), (686, 340))
    theta, lead = thetas[3], 0.35  # the query starts out ahead of the key
    for cx, m, n in ((170, 2, 0), (530, 5, 3)):
        ax.add_patch(Circle((cx, 462), radius, facecolor=PAPER, edgecolor=PALE))
        hand(cx, 462, m * theta + lead, f"q{m}", NOW)
        hand(cx, 462, n * theta, f"k{n}", KEPT_LINE)
        # y points down on the page, so the arc's angles are mirrored
        ends = {"theta1": -degrees(m * theta + lead), "theta2": -degrees(n * theta)}
        ax.add_patch(Arc((cx, 462), 76, 76, edgecolor=INK, linewidth=2.5, **ends))
    label(ax, 350, 462, "same angle:\nm − n = 2")
    text = "The angle between a query at position m\nand a key at n depends on m − n alone."
    label(ax, WIDTH / 2, 592, text)
    return ax


def race(height: int = 176) -> Axes:
    """Four candidates wait, each with its own rate; the first to ring is drawn."""
    ax, x, scale, top, row = canvas(height), 206, 74, 20, 30
    candidates = ((0.5, 0.90), (0.3, 0.24), (0.15, 0.75), (0.05, 0.29))  # p, E
    times = [noise / p for p, noise in candidates]
    for i, ((p, noise), time) in enumerate(zip(candidates, times)):
        y, wins = top + i * row, time == min(times)
        label(ax, 14, y, f"p = {p}", SMALL, ha="left", bold=wins)
        label(ax, 96, y, f"E = {noise:.2f}", SMALL, ha="left", bold=wins)
        line(ax, (x, y), (x + scale * time, y), color=INK if wins else PALE, width=2)
        dot = Circle((x + scale * time, y), 6, facecolor=NOW if wins else NEUTRAL, edgecolor=INK)
        ax.add_patch(dot)
        text = f"{time:.1f}: rings first, and is drawn" if wins else f"{time:.1f}"
        label(ax, x + scale * time + 14, y, text, SMALL, ha="left", bold=wins)
    low = top + 4 * row
    arrow(ax, (x, low), (680, low))
    label(ax, x, low + 20, "time until it rings: E / p", SMALL, SOFT, ha="left")
    return ax


DIAGRAMS = (decode_loop, gqa, naive_recompute, prefill_decode, cache_rows, rope, race)


def main() -> None:
    """Write every diagram."""
    others = diagrams_blocks, diagrams_kernels, diagrams_parallel, diagrams_serving
    for draw in (*DIAGRAMS, *(draw for module in others for draw in module.DIAGRAMS)):
        save(draw)


if __name__ == "__main__":
    main()

"""Draw the book's diagrams: `python book/diagrams.py` writes book/figures/*.svg.

A diagram is drawn in the pixels of a 700 pixel wide page, y downwards. Four colours, everywhere
with the same meaning: computed in this step, kept from before, wasted, and grey for the rest.
The same source gives the same bytes: no date, fixed ids, and text as outlines, which also makes
it look the same in every browser.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

FIGURES = Path(__file__).parent / "figures"
WIDTH = 700

NOW = "#F2A93B"  # computed in this step
KEPT = "#8EC5EA"  # computed before, and kept
WASTED = "#E38BB8"  # computed again, or memory that nobody can use
NEUTRAL = "#EDEEF0"
WHITE = "#FFFFFF"
INK = "#22262B"
SOFT = "#5F6670"  # lines and second-rank text

TEXT, SMALL = 17, 15  # sizes in pixels at full width

# the bundled model, nanovllm/tiny/config.json
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROPE_THETA = 8, 4, 64, 10_000.0


def canvas(height: int) -> Axes:
    """A white page, WIDTH by `height` pixels, origin at the top left."""
    figure = Figure(figsize=(WIDTH / 96, height / 96), facecolor=WHITE)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    return ax


def label(
    ax: Axes,
    x: float,
    y: float,
    text: str,
    size: float = TEXT,
    color: str = INK,
    ha: str = "center",
    bold: bool = False,
) -> None:
    """Text whose middle stands at height y."""
    weight = "bold" if bold else "normal"
    ax.text(
        x, y, text, fontsize=size * 0.75, color=color, ha=ha, va="center_baseline", weight=weight
    )


def box(
    ax: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    fill: str = NEUTRAL,
    note: str = "",
    size: float = TEXT,
    edge: str = SOFT,
) -> None:
    """A rounded box with its name, and a smaller note under the name."""
    shape = "round,pad=0,rounding_size=6"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, shape, facecolor=fill, edgecolor=edge, linewidth=1)
    )
    middle = y + height / 2
    label(ax, x + width / 2, middle - (9 if note else 0), text, size)
    if note:
        label(ax, x + width / 2, middle + 11, note, 14, SOFT)


def arrow(
    ax: Axes, *points: tuple[float, float], color: str = SOFT, width: float = 1.4, head: bool = True
) -> None:
    """A line through `points`, with a head at the last one."""
    xs, ys = zip(*points)
    ax.plot(xs[:-1], ys[:-1], color=color, linewidth=width, solid_joinstyle="round")
    style = "-|>" if head else "-"
    ax.add_patch(
        FancyArrowPatch(
            *points[-2:], arrowstyle=style, mutation_scale=11, color=color, linewidth=width,
            shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def cells(
    ax: Axes,
    x: float,
    y: float,
    fills: list[str],
    size: float | tuple[float, float],
    texts: list[str] | None = None,
) -> None:
    """A row of cells, one a fill."""
    width, height = size if isinstance(size, tuple) else (size, size)
    for i, fill in enumerate(fills):
        left = x + i * width
        ax.add_patch(
            Rectangle((left, y), width, height, facecolor=fill, edgecolor=SOFT, linewidth=0.9)
        )
        if texts:
            label(ax, left + width / 2, y + height / 2, texts[i], SMALL)


def legend(ax: Axes, x: float, y: float, entries: list[tuple[str, str, float]]) -> None:
    """Swatches in a row: (fill, text, width that the entry takes)."""
    for fill, text, width in entries:
        cells(ax, x, y - 9, [fill], 18)
        label(ax, x + 26, y, text, SMALL, ha="left")
        x += width


def decode_loop(height: int = 900) -> Axes:
    """One step of the loop: tokens in, the decoder layers, one token out, and back."""
    ax = canvas(height)
    left, width, middle = 46, 216, 154

    def stage(y: float, name: str, note: str = "", fill: str = NEUTRAL) -> None:
        box(ax, left, y, width, 52 if note else 38, name, fill, note)

    def edge(y0: float, y1: float, shape: str = "") -> None:
        arrow(ax, (middle, y0), (middle, y1))
        label(ax, middle + 12, (y0 + y1) / 2 - 2, shape, SMALL, SOFT, ha="left")

    label(ax, middle, 24, "token_ids", bold=True)
    cells(ax, middle - 90, 40, [KEPT] * 5 + [NOW], 30)
    edge(70, 112, "[num_tokens]")
    stage(112, "embed_tokens", "1536 × 256")
    edge(164, 224, "[num_tokens,\n hidden_size]")
    stage(224, "decoder layer", "× 5")
    edge(276, 336, "[num_tokens,\n hidden_size]")
    stage(336, "norm")
    edge(374, 418)
    stage(418, "last row only")
    edge(456, 506, "[1, hidden_size]")
    stage(506, "lm_head", "256 → 1536")
    edge(558, 608)
    stage(608, "logits", "[vocab_size] = [1536]", WHITE)
    edge(660, 706)
    stage(706, "sampler")
    edge(744, 790)
    cells(ax, middle - 15, 790, [NOW], 30)
    label(ax, middle + 26, 805, "next token", bold=True, ha="left")
    loop = [(middle - 15, 805), (18, 805), (18, 55), (middle - 92, 55)]
    arrow(ax, *loop, color=NOW, width=3)
    ax.text(
        31, 650, "append", fontsize=TEXT * 0.75, color=INK, rotation=90, ha="center", va="center"
    )

    x, span = 352, 332  # the layer, opened up
    centre, skip = x + 140, x + span - 20
    arrow(ax, (left + width, 224), (x, 40), color="#B9BEC5", head=False)
    arrow(ax, (left + width, 276), (x, 836), color="#B9BEC5", head=False)
    box(ax, x, 14, span, 836, fill="#F8F9FA", edge="#B9BEC5")

    def part(y: float, name: str, at: float = centre, w: float = 246, note: str = "") -> None:
        box(ax, at - w / 2, y, w, 50 if note else 34, name, WHITE, note, 16)

    def down(y0: float, y1: float, at: float = centre) -> None:
        arrow(ax, (at, y0), (at, y1))

    label(ax, x + 14, 36, "decoder layer", bold=True, ha="left")
    label(ax, skip + 8, 36, "[num_tokens, 256]", 14, SOFT, ha="right")
    down(50, 84)
    part(84, "input_layernorm")
    columns = [centre - 84, centre, centre + 84]
    for at, name, note in zip(columns, "qkv", ("→ 8 × 64", "→ 4 × 64", "→ 4 × 64")):
        down(118, 142, at)
        part(142, f"{name}_proj", at, 78, note)
    for at, name in zip(columns[:2], "qk"):
        down(192, 212, at)
        part(212, f"{name}_norm", at, 78)
        down(246, 266, at)
        part(266, "RoPE", at, 78)
        down(300, 322, at)
    down(192, 322, columns[2])
    part(322, "attention")
    down(356, 378)
    part(378, "o_proj", note="512 → 256")
    part(502, "post_attention_layernorm")
    for at, name in zip((centre - 63, centre + 63), ("gate", "up")):
        down(536, 560, at)
        part(560, f"{name}_proj", at, 118, "256 → 384")
    down(610, 632, centre - 63)
    part(632, "SiLU", centre - 63, 118)
    down(666, 690, centre - 63)
    down(610, 690, centre + 63)
    part(690, "gate · up")
    down(724, 746)
    part(746, "down_proj", note="384 → 256")
    for start, end in ((64, 452), (482, 820)):  # the residual stream passes each half by
        arrow(ax, (centre, start), (skip, start), (skip, end), (centre + 13, end))
        down(428 if end == 452 else 796, end - 12)
        ax.add_patch(Circle((centre, end), 12, facecolor=NEUTRAL, edgecolor=SOFT, linewidth=1))
        label(ax, centre, end, "+", 20)
        label(ax, centre - 20, end, "residual", SMALL, SOFT, ha="right")
    down(464, 502)
    down(832, 850)
    note = "Numbers: the bundled model. Attention alone mixes tokens; all else runs row by row."
    label(ax, WIDTH / 2, 878, note, SMALL, SOFT)
    return ax


def gqa(height: int = 330) -> Axes:
    """Pairs of query heads share a key/value head."""
    ax = canvas(height)
    x, pitch, group = 128, 71, NUM_HEADS // NUM_KV_HEADS
    label(ax, 14, 50, "query\nheads", ha="left", bold=True)
    label(ax, 14, 201, "key/value\nheads", ha="left", bold=True)
    for head in range(NUM_HEADS):
        centre = x + (head + 0.5) * pitch
        box(ax, centre - 28, 26, 56, 48, f"q{head}", NOW)
        pair = x + (head // group + 0.5) * group * pitch
        arrow(ax, (centre, 74), (pair + (centre - pair) * 0.35, 164), head=False, width=2)
    for head in range(NUM_KV_HEADS):
        centre = x + (head + 0.5) * group * pitch
        box(ax, centre - 58, 164, 116, 34, f"k{head}", KEPT)
        box(ax, centre - 58, 204, 116, 34, f"v{head}", KEPT)
    text = "num_kv_heads / num_heads = 4 / 8: half the keys and values\n"
    text += "of multi-head attention to keep"
    label(ax, WIDTH / 2, 284, text)
    return ax


def naive_recompute(height: int = 400) -> Axes:
    """Every step runs every token again."""
    ax = canvas(height)
    x, y, size, prompt, steps = 104, 66, 40, 4, 6
    for position in range(prompt + steps - 1):
        label(ax, x + (position + 0.5) * size, y - 14, str(position), SMALL, SOFT)
    label(ax, x + 4.5 * size, 20, "position")
    label(ax, 590, 20, "tokens run")
    for step in range(steps):
        num_tokens = prompt + step
        top = y + step * size
        label(ax, 14, top + size / 2, f"step {step + 1}", ha="left")
        fills = [NOW] * prompt if step == 0 else [WASTED] * (num_tokens - 1) + [NOW]
        cells(ax, x, top, fills, size)
        label(ax, 540, top + size / 2, str(num_tokens), ha="right", bold=True)
        text = "the prompt" if step == 0 else f"1 new + {num_tokens - 1} again"
        label(ax, 556, top + size / 2, text, SMALL, SOFT, ha="left")
    total = sum(range(prompt, prompt + steps))
    end = y + steps * size
    arrow(ax, (512, end + 6), (686, end + 6), head=False)
    label(ax, 540, end + 26, str(total), ha="right", bold=True)
    label(ax, 556, end + 26, f"for {prompt + steps - 1} tokens", SMALL, ha="left", bold=True)
    legend(ax, x, end + 60, [(NOW, "new", 90), (WASTED, "recomputed", 150)])
    return ax


def prefill_decode(height: int = 560) -> Axes:
    """The same weights serve num_tokens tokens in prefill, and one in decode."""
    ax = canvas(height)
    size, prompt = 22, 5

    def panel(top: float, title: str, kind: str, num_rows: int, shape: str, use: str) -> None:
        label(ax, 14, top, title, 19, ha="left", bold=True)
        label(ax, 686, top, kind, ha="right")
        middle = top + 84
        for row in range(num_rows):
            cells(ax, 34, middle + (row - num_rows / 2) * size, [NOW] * 4, size)
        label(ax, 14, middle + 74, shape, SMALL, SOFT, ha="left")
        label(ax, 147, middle, "×", 24)
        box(ax, 172, middle - 55, 110, 110, "weights", NEUTRAL)
        label(ax, 307, middle, "=", 24)
        for row in range(num_rows):
            cells(ax, 332, middle + (row - num_rows / 2) * size, [NOW] * 4, size)
        label(ax, 14, top + 206, use, ha="left")

    def cache(top: float, fills: list[str], what: str) -> None:
        label(ax, 576, top + 46, "KV cache", bold=True)
        fills = fills + [WHITE] * (8 - len(fills))
        cells(ax, 472, top + 64, fills, (26, 40))
        label(ax, 576, top + 134, what, SMALL)
        arrow(ax, (424, top + 84), (468, top + 84))

    use = "Each weight is read once and used for "
    title = "Prefill: the whole prompt"
    panel(26, title, "matrix × matrix", prompt, "[num_tokens, hidden]", use + "num_tokens tokens.")
    cache(26, [NOW] * prompt, "writes num_tokens\nkeys and values")
    arrow(ax, (14, 260), (686, 260), color="#B9BEC5", head=False)
    title = "Decode: the newest token"
    panel(290, title, "matrix × vector", 1, "[1, hidden]", use + "1 token.")
    cache(290, [KEPT] * prompt + [NOW], "appends 1 key and value,\nreads all of them")
    legend(ax, 14, 536, [(NOW, "computed in this step", 220), (KEPT, "kept from before", 200)])
    return ax


def cache_rows(height: int = 470) -> Axes:
    """A contiguous cache: a row a sequence, as long as the longest may become."""
    ax = canvas(height)
    x, y, size, row_len, max_tokens = 96, 96, (49, 44), 12, 6
    # prompt length, length at this step (the cell being written is the last), finished
    rows = [(6, 9, False), (3, 6, False), (4, 6, True), (2, 5, False)]
    label(ax, x + 6 * size[0], 20, "row_len = longest prompt + max_tokens = 6 + 6")
    arrow(ax, (x + 6 * size[0], 42), (x + 2, 42))
    arrow(ax, (x + 6 * size[0], 42), (x + 12 * size[0] - 2, 42))
    label(ax, 88, y - 18, "position", SMALL, SOFT, ha="right")
    slot_mapping, num_used = [], 0
    for position in range(row_len):
        label(ax, x + (position + 0.5) * size[0], y - 18, str(position), SMALL, SOFT)
    for row, (prompt, length, is_finished) in enumerate(rows):
        top = y + row * size[1]
        label(ax, 88, top + 22 - (9 if is_finished else 0), f"row {row}", ha="right")
        if is_finished:
            label(ax, 88, top + 33, "finished", 14, ha="right")
        fills = [KEPT] * (length - 1) + [NOW] + [WHITE] * (prompt + max_tokens - length)
        fills = fills + [WASTED] * (row_len - len(fills))
        if is_finished:
            fills = [WASTED] * row_len
        slots = [row * row_len + position for position in range(row_len)]
        cells(ax, x, top, fills, size, [str(slot) for slot in slots])
        end = x + prompt * size[0]  # the line between prompt and completion
        arrow(ax, (end, top), (end, top + size[1]), color=INK, width=3, head=False)
        slot_mapping.append(slots[length - 1])
        num_used += 0 if is_finished else length
    bottom = y + len(rows) * size[1]
    left = x + (rows[2][1] - 1) * size[0]
    frame = Rectangle((left + 3, y + 2 * 44 + 3), 43, 38, fill=False, edgecolor=NOW, linewidth=4)
    ax.add_patch(frame)
    legend(ax, 96, bottom + 30, [(KEPT, "kept: prompt | generated", 236), (NOW, "written now", 0)])
    legend(ax, 96, bottom + 60, [(WHITE, "reserved, not used yet", 236)])
    legend(ax, 332, bottom + 60, [(WASTED, "wasted", 0)])
    label(ax, 14, bottom + 104, "slot = row × row_len + position", ha="left")
    label(ax, 14, bottom + 136, f"slot_mapping = {slot_mapping}", ha="left", bold=True)
    text = f"{num_used} of {len(rows) * row_len} slots serve a running sequence"
    label(ax, 14, bottom + 168, text, ha="left")
    return ax


def rope(height: int = 610) -> Axes:
    """Positions are angles; differences of positions are differences of angles."""
    ax = canvas(height)

    def dial(cx: float, cy: float, radius: float) -> None:
        ax.add_patch(Circle((cx, cy), radius, facecolor="#F8F9FA", edgecolor="#B9BEC5"))

    def hand(
        cx: float, cy: float, radius: float, angle: float, text: str, color: str = SOFT
    ) -> None:
        dx, dy = cos(angle), -sin(angle)
        arrow(ax, (cx, cy), (cx + radius * dx, cy + radius * dy), color=color, width=2.4)
        label(ax, cx + (radius + 15) * dx, cy + (radius + 15) * dy, text, SMALL)

    label(ax, WIDTH / 2, 22, "One channel pair of one head, at positions 0, 1, 2, 3", bold=True)
    for cx, pair, speed in zip((122, 350, 578), (0, 3, 6), ("fast", "middle", "slow")):
        theta = ROPE_THETA ** (-2 * pair / HEAD_DIM)
        dial(cx, 150, 84)
        for position in range(4):
            color = NOW if position == 3 else SOFT
            hand(cx, 150, 84, position * theta, str(position), color)
        label(ax, cx, 266, f"{speed}: pair {pair}", bold=True)
        label(ax, cx, 290, f"θ = {theta:.2f}: {theta * 180 / pi:.0f}° a token", SMALL)
    arrow(ax, (14, 318), (686, 318), color="#B9BEC5", head=False)
    theta, turn = ROPE_THETA ** (-6 / HEAD_DIM), 0.35
    for cx, m, n in ((170, 2, 0), (530, 5, 3)):
        dial(cx, 440, 84)
        hand(cx, 440, 84, m * theta + turn, f"q{m}", NOW)
        hand(cx, 440, 84, n * theta, f"k{n}", KEPT)
        start, stop = n * theta * 180 / pi, (m * theta + turn) * 180 / pi
        # y points down on the page, so angles are mirrored
        ax.add_patch(
            Arc((cx, 440), 76, 76, theta1=-stop, theta2=-start, edgecolor=INK, linewidth=2.5)
        )
        label(ax, cx, 348, f"m = {m}, n = {n}") if False else None
    label(ax, 350, 440, "same angle\nm − n = 2")
    text = "The angle between a query at position m and a key at n\nturns with m − n alone."
    label(ax, WIDTH / 2, 574, text)
    return ax


DIAGRAMS: list[Callable[[], Axes]] = [
    decode_loop, gqa, naive_recompute, prefill_decode, cache_rows, rope,
]  # fmt: skip


def main() -> None:
    """Write every diagram."""
    FIGURES.mkdir(exist_ok=True)
    options = {"svg.hashsalt": "nanovllm", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **options}):
        for draw in DIAGRAMS:
            metadata = {"Date": None, "Creator": None, "Title": draw.__doc__}
            path = FIGURES / f"{draw.__name__}.svg"
            draw().figure.savefig(path, format="svg", metadata=metadata)
            # matplotlib ends lines of path data with blanks
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("".join(f"{s.rstrip()}\n" for s in lines), encoding="utf-8")


if __name__ == "__main__":
    main()

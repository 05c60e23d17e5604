"""The diagrams of chapters 6 to 9: kernels, graphs and overlap. diagrams.py writes them."""

from __future__ import annotations

from math import exp, inf, isclose

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from drawing import (
    INK,
    KEPT,
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
    label,
    legend,
    line,
)

SCORES = ((0.3, 1.1, -0.4, 0.7), (1.4, 2.3, 0.2, 1.6), (0.6, 2.0, 1.2, -0.8))


def number(value: float) -> str:
    """With one digit after the point, and a minus as wide as a plus."""
    return "−∞" if value == -inf else f"{value:.1f}".replace("-", "−")


def online_softmax(height: int = 650) -> Axes:
    """The state m, l, o takes in a tile of scores at a time."""
    ax, x, wide, right, unit, pitch = canvas(height), 114, 52, 350, 32, 166
    label(ax, 14, 22, "One query's scores s come in tiles of four.", ha="left", bold=True)
    m, l_sum, weights = -inf, 0.0, []  # o is the sum of weights[i] · v[i]
    for tile, scores in enumerate(SCORES):
        y, m_old, l_old = 46 + tile * pitch, m, l_sum
        m = max(m, *scores)
        factor, probs = exp(m_old - m), [exp(s - m) for s in scores]
        l_sum = l_sum * factor + sum(probs)
        weights = [weight * factor for weight in weights] + probs
        grows = m_old < m and tile > 0
        box(ax, 6, y, 688, pitch - 12, fill=PAPER, edge=INK if grows else PALE)
        label(ax, 18, y + 22, f"tile {tile}", ha="left", bold=True)
        label(ax, x - 10, y + 56, "s", ha="right")
        cells(ax, x, y + 40, [NOW] * 4, wide, 32, [number(s) for s in scores])
        label(ax, x - 10, y + 94, "exp(s − m)", SMALL, ha="right")
        cells(ax, x, y + 78, [NOW] * 4, wide, 32, [f"{p:.2f}" for p in probs])
        remark = "the maximum stays: nothing shrinks" if tile else "before it: m = −∞, l = 0, o = 0"
        remark = "a larger maximum: what was there shrinks" if grows else remark
        label(ax, x, y + 22, remark, SMALL, ha="left", bold=grows)
        text = f"m = max({number(m_old)}, {number(max(scores))}) = {number(m)}"
        label(ax, right, y + 50, text, SMALL, ha="left")
        text = f"factor = exp({number(m_old)} − {number(m)}) = {factor:.2f}"
        label(ax, right, y + 73, text, SMALL, ha="left", bold=grows)
        text = f"l = {factor:.2f} × {l_old:.2f} + {sum(probs):.2f} = {l_sum:.2f}"
        label(ax, right, y + 96, text, SMALL, ha="left")
        terms = [f"{p:.2f} v{tile * 4 + i}" for i, p in enumerate(probs)]
        text = " + ".join([f"o = {factor:.2f} × o", *terms])
        label(ax, 18, y + 134, text, SMALL, ha="left")
        bars = [("l before", [l_old]), ("l after", [l_old * factor, sum(probs)])]
        for row, (name, parts) in enumerate(bars):
            at, top = 490, y + 110 + row * 20
            if any(parts):
                label(ax, 628, top + 8, name, 14, SOFT, ha="left")
            for part, fill in zip(parts, (KEPT, NOW)):
                if part:
                    style = {"facecolor": fill, "edgecolor": SOFT}
                    ax.add_patch(Rectangle((at, top), part * unit, 15, **style))
                at += part * unit
    y, exact = 46 + len(SCORES) * pitch, [exp(s - m) for scores in SCORES for s in scores]
    shares = [weight / l_sum for weight in weights]
    assert all(isclose(a, e / sum(exact)) for a, e in zip(shares, exact))
    text = "o / l: the exact softmax average of v0 to v11, with these weights"
    label(ax, 14, y + 14, text, ha="left", bold=True)
    cells(ax, 14, y + 32, [NOW] * len(shares), 56, 32, [f"{share:.2f}" for share in shares])
    text = "They are softmax(s) over all twelve scores, though never more than four were at hand."
    label(ax, 14, y + 84, text, SMALL, ha="left")
    return ax


def attention_traffic(height: int = 596) -> Axes:
    """What one head's attention moves between the GPU's memory and its chip."""
    ax, n, d, pitch, top = canvas(height), 4096, 128, 42, 118
    once, twice = "n × d", "n × n"
    reads = [("Q", 0, once, 1), ("K", 1, once, 1), ("S", 2, twice, -1), ("S", 3, twice, 1)]
    reads += [("P", 4, twice, -1), ("P", 5, twice, 1), ("V", 6, once, 1), ("O", 7, once, -1)]
    kernels = [("S = Q Kᵀ", 0, 2), ("softmax", 3, 4), ("O = P V", 5, 7)]
    panels = [(14, "three kernels", reads, kernels)]
    reads = [(name, row, size, way) for name, row, size, way in reads if size == once]
    panels.append((372, "one kernel", reads, [("", 0, 7)]))
    for x, title, moves, programs in panels:
        chip = x + 186
        label(ax, x, 22, title, 19, ha="left", bold=True)
        box(ax, x, 46, 84, 8 * pitch + 84, fill=PAPER, edge=PALE)
        label(ax, x + 42, 78, "memory\n(HBM)", SMALL)
        box(ax, chip - 8, 46, 136, 8 * pitch + 84, fill=PAPER, edge=PALE)
        label(ax, chip + 60, 78, "on chip", SMALL)
        for name, start, stop in programs:
            y = top + start * pitch
            box(ax, chip, y + 3, 120, (stop - start + 1) * pitch - 6, name, WHITE)
        for name in dict.fromkeys(move[0] for move in moves):
            rows = [row for key, row, _, _ in moves if key == name]
            y, tall = top + rows[0] * pitch, len(rows) * pitch
            fill = WASTED if name in "SP" else NEUTRAL
            box(ax, x + 22, y + 4, 40, tall - 8, name, fill)
        for name, row, size, way in moves:
            y, ends = top + row * pitch + 26, (x + 64, chip - 2)
            style = {"color": WASTED, "width": 3.4} if name in "SP" else {"width": 1.8}
            arrow(ax, *[(end, y) for end in ends[::way]], **style)
            label(ax, sum(ends) / 2, y - 13, size, SMALL)
    chip = 372 + 186
    cells(ax, chip + 24, top + 2.05 * pitch, [NOW] * 4, 18)
    cells(ax, chip + 24, top + 2.05 * pitch + 18, [NOW] * 4, 18)
    label(ax, chip + 60, top + 4.1 * pitch, "tiles of S\nand P stay\nhere, with\nm, l, o", SMALL)
    few, many = 4 * n * d, 4 * n * d + 4 * n * n
    label(ax, 14, 496, "4 n d + 4 n² numbers", ha="left", bold=True)
    label(ax, 372, 496, "4 n d numbers", ha="left", bold=True)
    text = f"n = {n} tokens, head_dim d = {d}: {many / 1e6:.0f} million numbers "
    text += f"against\n{few / 1e6:.1f} million: 1 + n / d = {many // few} times as many"
    legend(ax, 14, 528, WASTED, "written only to be read back by the next kernel")
    label(ax, 14, 570, text, SMALL, ha="left")
    return ax


def split_context(height: int = 778) -> Axes:
    """One new token's context, shared out among three programs."""
    ax, size, part_at, part_wide = canvas(height), 40, (14, 248, 482), 204
    pool, table = 14, (7, 2, 11, 5, 0, 9, 3, 8, 1)
    pool_y, table_y, program_y, out_y, join_y = 76, 190, 276, 434, 490
    label(ax, 14, 22, "One sequence, one new token, a context of 9 blocks", ha="left", bold=True)
    label(ax, 14, 58, "the pool", SMALL, ha="left", bold=True)
    pitch = (686 - 14) / 14
    for block_id in range(14):
        fill = KEPT if block_id in table else WHITE
        cells(ax, pool + block_id * pitch + 2, pool_y, [fill], pitch - 4, 34, [str(block_id)])
    for i, block_id in enumerate(table):
        x = part_at[i // 3] + 30 + (i % 3) * 52
        line(ax, (x + 20, table_y), (pool + (block_id + 0.5) * pitch, pool_y + 34))
        box(ax, x, table_y, size, 34, str(block_id))
    for part, x in enumerate(part_at):
        centre = x + part_wide / 2
        ends = [(x + 30, table_y + 46), (x + 174, table_y + 46)]
        line(ax, (ends[0][0], table_y + 40), *ends, (ends[1][0], table_y + 40), color=SOFT)
        arrow(ax, (centre, table_y + 46), (centre, program_y))
        box(ax, x, program_y, part_wide, 112, fill=PAPER, edge=PALE)
        label(ax, centre, program_y + 20, f"program {part}", bold=True)
        label(ax, centre, program_y + 44, "on a multiprocessor", SMALL, SOFT)
        for row in range(2):
            cells(ax, x + 16, program_y + 62 + row * 18, [NOW] * 4, 9, 18)
        label(ax, x + 65, program_y + 80, "×", 20)
        block_ids = [str(block_id) for block_id in table[part * 3 : part * 3 + 3]]
        cells(ax, x + 80, program_y + 62, [KEPT] * 3, 36, texts=block_ids)
        arrow(ax, (centre, program_y + 112), (centre, out_y - 14))
        label(ax, centre, out_y, f"mean{part}, lse{part}")
        arrow(ax, (centre, out_y + 14), (centre, join_y))
    label(ax, 14, table_y - 38, "block_table", SMALL, ha="left", bold=True)
    box(ax, 14, join_y, 672, 84, fill=NEUTRAL)
    label(ax, WIDTH / 2, join_y + 24, "The program that ends last joins the three:", bold=True)
    text = "wᵢ = 2^(lseᵢ − largest lse),   result: Σ wᵢ meanᵢ / Σ wᵢ"
    label(ax, WIDTH / 2, join_y + 58, text)
    y = join_y + 112
    label(ax, 14, y, "inside a program, a tile at a time", ha="left", bold=True)
    for row in range(2):
        label(ax, 58, y + 63 + row * 30, f"q{row}", ha="right")
        cells(ax, 66, y + 48 + row * 30, [NOW] * 4, 30)
    label(ax, 126, y + 134, "2 query heads\nof one group", SMALL)
    label(ax, 208, y + 78, "×", 24)
    for row in range(4):
        cells(ax, 234, y + 18 + row * 30, [KEPT] * 4, 30)
    label(ax, 294, y + 154, "keys, each a column", SMALL)
    label(ax, 380, y + 78, "=", 24)
    for row in range(2):
        cells(ax, 404, y + 48 + row * 30, [NOW] * 4, 30)
    label(ax, 464, y + 124, "scores", SMALL)
    label(ax, 610, y + 78, "Each key is read\nonce, for both\nheads.", SMALL)
    return ax


def prefill_tiles(height: int = 506) -> Axes:
    """The causal mask of a chunk, tile by tile."""
    ax, x, y, tile, num_cached, num_new = canvas(height), 112, 106, 72, 4, 4
    block_table = (5, 1, 6, 2)
    num_columns, counts = num_cached + num_new, {"all": 0, "some": 0, "none": 0}
    split = x + num_cached * tile
    label(ax, (x + split) / 2, 20, "cached prefix, in blocks", bold=True)
    label(ax, (split + x + num_columns * tile) / 2, 20, "new tokens", bold=True)
    label(ax, 14, 60, "key tiles →", SMALL, SOFT, ha="left")
    label(ax, 14, 88, "query tiles ↓", SMALL, SOFT, ha="left")
    for column in range(num_columns):
        cached = column < num_cached
        fill = KEPT if cached else NOW
        text = f"block {block_table[column]}" if cached else f"new {column - num_cached}"
        box(ax, x + column * tile + 3, 44, tile - 6, 32, text, fill, size=SMALL)
    for row in range(num_new):
        top = y + row * tile
        box(ax, 14, top + 20, 84, 32, f"new {row}", NOW, size=SMALL)
        for column in range(num_columns):
            left, ahead = x + column * tile, column - num_cached - row
            kind = "all" if ahead < 0 else "some" if ahead == 0 else "none"
            counts[kind] += 1
            fill = WHITE if kind == "none" else NOW
            edge = {"edgecolor": PALE if kind == "none" else SOFT}
            ax.add_patch(Rectangle((left + 2, top + 2), tile - 4, tile - 4, facecolor=fill, **edge))
            if kind == "some":
                cell = (tile - 4) / 4
                for i in range(4):
                    fills = [NOW if j <= i else WASTED for j in range(4)]
                    cells(ax, left + 2, top + 2 + i * cell, fills, cell)
    end = y + num_new * tile
    line(ax, (split, 40), (split, end + 4), color=INK, width=2)
    for i, (fill, kind, text) in enumerate((
        (NOW, "all", "seen by every query of the tile: no mask"),
        (WASTED, "some", "ahead of its query: masked, in tiles on the diagonal"),
        (WHITE, "none", "ahead of every query of the tile: never visited"),
    )):  # fmt: skip
        legend(ax, x, end + 32 + i * 28, fill, f"{text} ({counts[kind]} tiles)")
    return ax


def spans(
    ax: Axes, x: float, y: float, parts: list[tuple[float, float, str, str, str]], tall: float = 44
) -> None:
    """Bars (start, end, fill, text, second line) on a row of time."""
    for start, end, fill, text, note in parts:
        style = {"facecolor": fill, "edgecolor": SOFT}
        ax.add_patch(Rectangle((x + start, y), end - start, tall, **style))
        middle = x + (start + end) / 2
        label(ax, middle, y + tall / 2 - (9 if note else 0), text, 14)
        label(ax, middle, y + tall / 2 + 10, note, 14)


def launch_gaps(height: int = 424) -> Axes:
    """Launching each kernel, or all of them at once."""
    ax, x, launch, kernel, graph, count = canvas(height), 66, 72, 32, 104, 8
    eager, free = [], 0
    for i in range(count):
        start = max(free, (i + 1) * launch)
        eager += [(free, start, WASTED, "", ""), (start, start + kernel, NOW, str(i), "")]
        free = start + kernel
    host = [(i * launch, (i + 1) * launch, NEUTRAL, "launch", str(i)) for i in range(count)]
    starts = [graph + i * kernel for i in range(count)]
    runs = [(start, start + kernel, NOW, str(i), "") for i, start in enumerate(starts)]
    end = starts[-1] + kernel
    once = [(0, graph, NEUTRAL, "launch", "the graph")]
    for top, title, launches, gpu in (
        (24, "eager: a launch for each kernel", host, eager),
        (204, "graph: one launch for all", once, [(0, graph, WASTED, "", ""), *runs]),
    ):
        label(ax, 14, top, title, ha="left", bold=True)
        label(ax, 14, top + 44, "host", SMALL, ha="left")
        label(ax, 14, top + 102, "GPU", SMALL, ha="left")
        spans(ax, x, top + 22, launches)
        spans(ax, x, top + 80, gpu)
        for _, ready, *_ in launches:
            arrow(ax, (x + ready, top + 66), (x + ready, top + 80))
    label(ax, x + graph + 14, 248, "the host is free", SMALL, SOFT, ha="left")
    line(ax, (x + free, 148), (x + free, 334))
    arrow(ax, (x + free, 306), (x + end + 4, 306), width=2)
    label(ax, x + (end + free) / 2, 288, "time saved", SMALL)
    label(ax, 14, 352, "time", SMALL, SOFT, ha="left")
    arrow(ax, (x, 352), (686, 352))
    legend(ax, x, 394, NOW, "a kernel runs")
    legend(ax, x + 162, 394, WASTED, "the GPU waits for the host")
    return ax


def overlap(height: int = 570) -> Axes:
    """The host's work between the GPU's steps, or during them."""
    ax, x, prepare, run, read = canvas(height), 62, 54, 110, 42
    steps = ("n", "n+1", "n+2")

    def rows(top: float, title: str, host: list[tuple], gpu: list[tuple]) -> None:
        label(ax, 14, top, title, ha="left", bold=True)
        label(ax, 14, top + 44, "host", SMALL, ha="left")
        label(ax, 14, top + 104, "GPU", SMALL, ha="left")
        spans(ax, x, top + 22, host)
        spans(ax, x, top + 82, gpu)

    host, gpu, now, idle = [], [], 0, 0
    for step in steps:
        start = now + prepare
        end, now = start + run, start + run + read
        host += [(start - prepare, start, NEUTRAL, "prep", step), (end, now, NEUTRAL, "read", step)]
        gpu += [(idle, start, WASTED, "", ""), (start, end, NOW, f"run {step}", "")]
        idle = end
    rows(24, "one after another", host, [*gpu, (idle, now, WASTED, "", "")])
    slow = now

    top = 200
    host, gpu = [(0, prepare, NEUTRAL, "prep", "n")], [(0, prepare, WASTED, "", "")]
    now, start, waits, ends = prepare, prepare, [], []
    for i, step in enumerate(steps):
        end = start + run
        gpu.append((start, end, NOW, f"run {step}", ""))
        for later in steps[i + 1 : i + 2]:
            host.append((now, now + prepare, NEUTRAL, "prep", later))
            now += prepare
        assert now <= end  # the next step is there when this one ends
        waits.append((now, end))
        ends.append(end)
        host.append((end, end + read, NEUTRAL, "read", step))
        now, start = end + read, end
    rows(top, "overlapped", host, [*gpu, (end, now, WASTED, "", "")])
    dotted = {"facecolor": WHITE, "edgecolor": INK, "linestyle": ":", "linewidth": 1.6}
    for begin, end in waits:
        ax.add_patch(Rectangle((x + begin, top + 22), end - begin, 44, **dotted))
        if end - begin > 40:
            label(ax, x + (begin + end) / 2, top + 44, "wait", 14, bold=True)
    # a step's token goes straight into the next step
    low = top + 126
    for end in ends[:-1]:
        arrow(ax, (x + end - 12, low), (x + end - 12, low + 20), (x + end + 12, low + 20),
              (x + end + 12, low), color=NOW, width=2.8)  # fmt: skip
    line(ax, (x + slow, 24 + 126), (x + slow, top + 126))
    arrow(ax, (x + slow, top + 104), (x + now + 4, top + 104), width=2)
    label(ax, x + (slow + now) / 2, top + 86, "time saved", SMALL)
    text = "on the GPU: the token that step n sampled\n"
    text += "replaces the placeholder in step n+1's input"
    label(ax, x + ends[0] - 20, low + 46, text, SMALL, ha="left")
    label(ax, 14, low + 92, "time", SMALL, SOFT, ha="left")
    arrow(ax, (x, low + 92), (686, low + 92))
    y = low + 128
    ax.add_patch(Rectangle((9, y + 16), 48, 24, **dotted))
    for i, (name, text) in enumerate((
        ("prep", "schedule and prepare; overlapped, n+1's input tokens are placeholders"),
        ("wait", "the one place where the host waits: for the step's tokens"),
        ("read", "read the step's tokens and postprocess them"),
    )):  # fmt: skip
        label(ax, 14, y + i * 28, name, SMALL, ha="left", bold=True)
        label(ax, x + 4, y + i * 28, text, SMALL, ha="left")
    legend(ax, 14, y + 88, NOW, "the GPU runs a step")
    legend(ax, 234, y + 88, WASTED, "the GPU idles")
    return ax


def counters(height: int = 324) -> Axes:
    """What the numbers of a sequence count, while two steps are in flight."""
    ax, x, wide, top = canvas(height), 244, 34, 34
    prompt, length, pending = 8, 13, 2
    fills = [KEPT] * (length - pending) + [NOW, WHITE]
    texts = [*map(str, range(length - pending)), *["?"] * pending]
    label(ax, 14, top + 17, "token_ids", ha="left", bold=True)
    cells(ax, x, top, fills, wide, 34, texts)
    label(ax, x + prompt * wide / 2, top - 16, "prompt", SMALL, SOFT)
    label(ax, x + (prompt + length) * wide / 2, top - 16, "completion", SMALL, SOFT)
    for i, (name, start, stop) in enumerate((
        ("num_prompt_tokens", 0, prompt),
        ("num_cached_tokens", 0, 4),
        ("num_computed_tokens", 0, length - 1),
        ("num_scheduled_tokens", length - 2, length - 1),
        ("num_known_tokens", 0, length - pending),
        ("num_pending_tokens", length - pending, length),
    )):  # fmt: skip
        y, left, right = top + 62 + 30 * i, x + start * wide, x + stop * wide
        label(ax, 14, y, f"{name} = {stop - start}", SMALL, ha="left")
        line(ax, (left + 3, y), (right - 3, y), color=INK, width=2)
        for end in (left + 3, right - 3):
            line(ax, (end, y - 6), (end, y + 6), color=INK, width=2)
    y = height - 34
    legend(ax, 14, y, KEPT, "in the cache")
    legend(ax, 158, y, NOW, "run by the step just launched")
    legend(ax, 436, y, WHITE, "run by the next one")
    return ax


DIAGRAMS = (
    online_softmax,
    attention_traffic,
    split_context,
    prefill_tiles,
    launch_gaps,
    overlap,
    counters,
)

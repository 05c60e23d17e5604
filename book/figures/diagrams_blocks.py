"""The diagrams of chapters 3 to 5: blocks, prefixes and steps. diagrams.py writes them."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import xxhash
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from drawing import (
    INK,
    KEPT,
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

TOKENIZER = Path(__file__).resolve().parents[2] / "nanovllm/tiny/tokenizer.json"
BLOCK_SIZE = 4


def block_table(height: int = 632) -> Axes:
    """A text lies in order, its blocks lie anywhere; the block table says where."""
    ax, num_blocks, sequences = canvas(height), 8, (("A", 10, [5, 1, 6]), ("B", 6, [2, 7]))
    x, top, size, pitch, table_x, cache_x, cache_y = 14, 68, 40, 46, 224, 448, 50
    label(ax, x, 22, "text, by position", ha="left", bold=True)
    label(ax, table_x + 20, 22, "block_table", bold=True)
    label(ax, cache_x - 20, 22, "cache, block_size = 4", ha="left", bold=True)
    fills, owners, slot_mapping = {}, {}, []
    for row, (name, num_tokens, table) in enumerate(sequences):
        label(ax, x, top, f"{name}: {num_tokens} tokens", ha="left")
        for i, block_id in enumerate(table):
            y, positions = top + 20 + i * pitch, range(num_tokens)[i * BLOCK_SIZE :][:BLOCK_SIZE]
            colors = [NOW if position == num_tokens - 1 else KEPT for position in positions]
            cells(ax, x, y, colors, size, texts=[str(position) for position in positions])
            label(ax, table_x - 8, y + 20, f"[{i}]", SMALL, SOFT, ha="right")
            box(ax, table_x, y, 40, 40, str(block_id))
            style = {"color": NOW, "width": 2.8} if NOW in colors else {}
            end = (cache_x - 30, cache_y + block_id * pitch + size / 2)
            arrow(ax, (table_x + 42, y + 20), end, **style)
            fills[block_id] = colors + [WASTED] * (BLOCK_SIZE - len(colors))
            owners[block_id] = name
        top += 20 + len(table) * pitch + 30
        i, offset = divmod(num_tokens - 1, BLOCK_SIZE)  # the newest token's
        slot_mapping.append(table[i] * BLOCK_SIZE + offset)
        text = f"{name}: block_table[{num_tokens - 1} // 4] × 4 + {num_tokens - 1} % 4"
        text += f" = {table[i]} × 4 + {offset} = {slot_mapping[-1]}"
        label(ax, 14, 560 + 26 * row, text, ha="left")
    for block_id in range(num_blocks):
        y = cache_y + block_id * pitch
        slots = [str(block_id * BLOCK_SIZE + i) for i in range(BLOCK_SIZE)]
        label(ax, cache_x - 10, y + 20, str(block_id), ha="right")
        cells(ax, cache_x, y, fills.get(block_id, [WHITE] * BLOCK_SIZE), 48, size, slots)
        label(ax, cache_x + 202, y + 20, owners.get(block_id, "free"), SMALL, SOFT, ha="left")
    legend(ax, 14, 438, KEPT, "kept from before")
    legend(ax, 14, 466, NOW, "written in this step")
    legend(ax, 262, 438, WASTED, "nobody else can use: at most 3 a sequence")
    legend(ax, 262, 466, WHITE, "free, for whoever needs a block")
    text = "slot = block_table[position // block_size] × block_size"
    label(ax, 14, 506, text, ha="left")
    label(ax, 72, 530, "+ position % block_size", ha="left")
    label(ax, 14, 614, f"slot_mapping = {slot_mapping}", ha="left", bold=True)
    return ax


def append_block(height: int = 480) -> Axes:
    """The newest token needs a slot; where it is the first of its block, a block is taken."""
    ax, x, size, pitch, num_owned = canvas(height), 14, 37, 80, 1
    label(ax, x, 32, "tokens, by position", SMALL, SOFT, ha="left")
    heads = {358: "len", 422: "len % 4", 500: "blocks\nneeded", 578: "blocks\nowned"}
    for at, text in {**heads, 654: "take\na block?"}.items():
        label(ax, at, 32, text, SMALL, SOFT)
    notes = {4: "full, but the newest token has its slot", 5: "no slot was left: a new block"}
    for row, num_tokens in enumerate((3, 4, 5, 6)):
        y, num_needed = 68 + row * pitch, -(-num_tokens // BLOCK_SIZE)
        takes = num_needed > num_owned
        if takes:
            style = {"facecolor": PAPER, "edgecolor": PALE}
            ax.add_patch(Rectangle((6, y - 10), 688, 74, **style))
        fills = [KEPT] * (num_tokens - 1) + [NOW]
        fills += [WHITE] * (num_needed * BLOCK_SIZE - num_tokens)
        for block in range(num_needed):
            positions = range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            colors = [fills[position] for position in positions]
            texts = [str(position) for position in positions]
            cells(ax, x + block * (BLOCK_SIZE * size + 10), y, colors, size, texts=texts)
        label(ax, x, y + size + 13, notes.get(num_tokens, ""), SMALL, ha="left")
        values = (num_tokens, num_tokens % BLOCK_SIZE, num_needed, num_owned)
        for at, value in zip(heads, values):
            label(ax, at, y + size / 2, str(value), bold=takes)
        label(ax, 654, y + size / 2, "yes" if takes else "no", bold=takes)
        num_owned = num_needed
    legend(ax, 14, 396, KEPT, "in the cache: len − 1 tokens")
    legend(ax, 330, 396, WHITE, "empty")
    legend(ax, 14, 424, NOW, "the newest token: sampled, not run yet, needs a slot in this step")
    label(ax, 14, 460, "A decode takes a block when len % block_size == 1.", ha="left", bold=True)
    return ax


def hash_chain(height: int = 604) -> Axes:
    """The hash of a block covers all that stands before it."""
    ax, size, pitch = canvas(height), 46, 194
    vocab = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    prompts = (  # with the position of the word that A has not
        ("A, in the cache", "time", "fox", None),
        ("B, new: its first two blocks are A's", "time", "girl", 8),
        ("C, new: differs from A in one early word", "day", "fox", 3),
    )
    known, block_ids = {}, (5, 1, 6, 7, 2, 4, 0)
    for row, (title, noun, hero, changed) in enumerate(prompts):
        y, key = 48 + row * 166, 0
        text = f"Once upon a {noun} there was a little {hero} who lived in the wood"
        words = text.split()
        token_ids = array("q", [vocab[token] for token in text.replace(" ", " Ġ").split()])
        label(ax, 14, y - 22, title, ha="left", bold=True)
        label(ax, 24, y + 75, "0", SMALL)
        num_full = len(words) // BLOCK_SIZE
        for block in range(num_full):
            span = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            x, centre = 14 + block * pitch, 14 + block * pitch + 2 * size
            key = xxhash.xxh64_intdigest(token_ids[span].tobytes(), seed=key)
            is_known = key in known
            block_id = known.setdefault(key, block_ids[len(known)])
            fill = KEPT if is_known or row == 0 else NOW
            cells(ax, x, y, [fill] * BLOCK_SIZE, size, 36, words[span])
            arrow(ax, (centre, y + 36), (centre, y + 58))
            arrow(ax, (max(centre - pitch + 42, 34), y + 75), (centre - 42, y + 75))
            box(ax, centre - 42, y + 58, 84, 34, f"{key:016x}"[:4] + "…", fill)
            if block:
                label(ax, centre - pitch / 2, y + 63, "seed", SMALL, SOFT)
            found = "" if row == 0 else "found: " if is_known else "new: "
            label(ax, centre, y + 108, f"{found}block {block_id}", SMALL)
        x, rest = 14 + num_full * pitch, words[num_full * BLOCK_SIZE :]
        cells(ax, x, y, [NOW if row else KEPT] * len(rest), size, 36, rest)
        label(ax, x + size, y + 66, "not full:\nno hash", SMALL, SOFT)
        if changed is not None:
            block, i = divmod(changed, BLOCK_SIZE)
            style = {"fill": False, "edgecolor": INK, "linewidth": 3}
            ax.add_patch(Rectangle((14 + block * pitch + i * size, y), size, 36, **style))
    text = "hash = xxh64(the block's 4 tokens, seed = the hash before)"
    label(ax, 14, 536, text, ha="left")
    legend(ax, 14, 574, KEPT, "in the cache")
    legend(ax, 170, 574, NOW, "to be computed")
    return ax


def block_life(height: int = 500) -> Axes:
    """A block is free or owned, and what it holds can be found or not."""
    ax, wide, tall, left, right, top, low = canvas(height), 236, 112, 14, 450, 48, 284
    label(ax, left + wide / 2, 24, "free: ref_count = 0", bold=True)
    label(ax, right + wide / 2, 24, "owned: ref_count ≥ 1", bold=True)
    for x, y, fills, name, note in (
        (left, top, [WHITE] * 4, "empty", "taken first"),
        (right, top, [KEPT, KEPT, NOW, WHITE], "filling", "cannot be found yet"),
        (right, low, [KEPT] * 4, "full, in use", "can be found and shared"),
        (left, low, [KEPT] * 4, "full, kept", "can still be found"),
    ):
        box(ax, x, y, wide, tall, fill=PAPER, edge=PALE)
        cells(ax, x + wide / 2 - 56, y + 14, fills, 28)
        label(ax, x + wide / 2, y + 62, name)
        label(ax, x + wide / 2, y + 90, note, SMALL, SOFT)
    end, middle, centre, bottom = left + wide, WIDTH / 2, right + wide / 2, low + tall
    forget = "no empty block: take_block\ntakes the longest free one\nand forgets what it held"
    for start, stop, at, text in (
        ((end, top + 38), (right, top + 38), (middle, top + 22), "take_block"),
        ((right, top + 76), (end, top + 76), (middle, top + 94), "owner leaves"),
        ((centre, top + tall), (centre, low), (centre + 54, 222), "last slot\nis filled"),
        ((right, low + 38), (end, low + 38), (middle, low + 22), "last owner leaves"),
        ((end, low + 76), (right, low + 76), (middle, low + 94), "hit: owned again"),
        ((end - 20, low), (right + 20, top + tall), (132, 220), forget),
    ):
        arrow(ax, start, stop, width=2)
        label(ax, *at, text, SMALL)
    loop = [(centre + 60, bottom + 26), (centre - 60, bottom + 26), (centre - 60, bottom)]
    arrow(ax, (centre + 60, bottom), *loop, width=2)
    text = "another hit: ref_count + 1\nan owner leaves: ref_count − 1"
    label(ax, centre, bottom + 58, text, SMALL)
    legend(ax, left, bottom + 28, KEPT, "kept keys and values")
    legend(ax, left, bottom + 56, NOW, "written in this step")
    legend(ax, left, bottom + 84, WHITE, "nothing of use")
    return ax


def step_budget(height: int = 476) -> Axes:
    """A step hands out its budget of tokens from the top down."""
    ax, x, y, size, pitch, budget = canvas(height), 128, 86, 17, 50, 16
    num_at, left_at, sample_at = 478, 556, 642
    label(ax, x, 30, "a cell is a token,\na bar is num_tokens", SMALL, SOFT, ha="left")
    label(ax, num_at, 30, "tokens in\nthis step", SMALL, SOFT)
    label(ax, left_at, 30, "budget\nleft", SMALL, SOFT)
    label(ax, sample_at, 30, "samples\na token?", SMALL, SOFT)
    label(ax, left_at, 66, str(budget), color=SOFT)
    left, kinds = budget, ["decode"] * 3 + ["prompt, begun", "prompt, new"]
    nums = [(9, 10), (15, 16), (5, 6), (8, 14), (0, 18)]  # num_computed_tokens, num_tokens
    for row, (num_computed, num_tokens) in enumerate(nums):
        top, num_scheduled = y + row * pitch, min(num_tokens - num_computed, left)
        num_missing = num_tokens - num_computed - num_scheduled
        left -= num_scheduled
        label(ax, 14, top + 5, "ABCDE"[row], ha="left", bold=True)
        label(ax, 14, top + 25, kinds[row], 14, SOFT, ha="left")
        fills = [KEPT] * num_computed + [NOW] * num_scheduled + [WHITE] * num_missing
        cells(ax, x, top, fills, size, 30)
        label(ax, num_at, top + 15, str(num_scheduled), bold=True)
        label(ax, left_at, top + 15, str(left), color=SOFT)
        text = f"no, {num_missing} to go" if num_missing else "yes"
        label(ax, sample_at, top + 15, text, SMALL)
    end = y + len(nums) * pitch
    line(ax, (num_at - 30, end - 8), (num_at + 30, end - 8), color=SOFT)
    label(ax, num_at, end + 12, str(budget - left), bold=True)
    legend(ax, 14, end + 48, KEPT, "num_computed_tokens")
    legend(ax, 238, end + 48, NOW, "num_scheduled_tokens")
    legend(ax, 468, end + 48, WHITE, "left for later steps")
    text = "Each sequence gets tokens until it has caught up, while the\n"
    text += "budget lasts. One that has caught up samples its next token."
    label(ax, 14, end + 104, text, ha="left")
    return ax


DIAGRAMS = (block_table, append_block, hash_chain, block_life, step_budget)

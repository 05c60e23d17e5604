"""The diagrams of a layer on two ranks and of a layer of experts. diagrams.py writes them."""

from __future__ import annotations

from matplotlib.axes import Axes

from drawing import (
    KEPT,
    NEUTRAL,
    NOW,
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
)

OWN = (KEPT, NOW)  # rank 0's and rank 1's


def stack(ax: Axes, x: float, y: float, size: float, name: str, note: str) -> None:
    """A matrix whose rows lie on two ranks."""
    for rank, fill in enumerate(OWN):
        cells(ax, x, y + rank * 2 * size, [fill] * 4, size)
        cells(ax, x, y + (rank * 2 + 1) * size, [fill] * 4, size)
    label(ax, x + 2 * size, y - 16, name, bold=True)
    label(ax, x + 2 * size, y + 4 * size + 16, note, SMALL, SOFT)


def side_by_side(ax: Axes, x: float, y: float, size: float, name: str, note: str) -> None:
    """A matrix whose columns lie on two ranks."""
    for row in range(4):
        cells(ax, x, y + row * size, [OWN[0]] * 2 + [OWN[1]] * 2, size)
    label(ax, x + 2 * size, y - 16, name, bold=True)
    label(ax, x + 2 * size, y + 4 * size + 16, note, SMALL, SOFT)


def half(ax: Axes, x: float, y: float, size: float, name: str, whole: str = "") -> None:
    """A vector: each rank has a half of it or, where `whole` is its colour, all of it."""
    for row in range(4):
        cells(ax, x, y + row * size, [whole or OWN[row // 2]], size)
    label(ax, x + size / 2, y - 16, name, bold=True)


def tensor_parallel(height: int = 500) -> Axes:
    """Attention and the MLP, each a pair of matrices: cut by outputs, then by inputs."""
    ax, size = canvas(height), 26
    pairs = (
        ("Attention", "qkv_proj", "attention\nover own heads", "o_proj"),
        ("MLP", "gate, up", "silu(gate) × up,\nown channels", "down"),
    )
    for number, (title, first, between, second) in enumerate(pairs):
        y = 76 + number * 200
        label(ax, 14, y - 48, title, ha="left", bold=True)
        half(ax, 20, y, size, "x", NEUTRAL)
        label(ax, 33, y + 4 * size + 16, "whole", SMALL, SOFT)
        stack(ax, 86, y, size, first, "rows: outputs")
        arrow(ax, (200, y + 52), (236, y + 52))
        half(ax, 246, y, size, "")
        arrow(ax, (282, y + 52), (310, y + 52))
        box(ax, 314, y + 22, 124, 60, between, WHITE, size=SMALL)
        arrow(ax, (440, y + 52), (464, y + 52))
        side_by_side(ax, 474, y, size, second, "columns: inputs")
        arrow(ax, (588, y + 52), (612, y + 52))
        half(ax, 620, y, size, "", KEPT)
        label(ax, 655, y + 52, "+")
        half(ax, 666, y, size, "", NOW)
        label(ax, 656, y + 4 * size + 16, "all-reduce", SMALL, SOFT)
    cells(ax, 20, 444, [KEPT], 18)
    label(ax, 46, 453, "on rank 0", SMALL, ha="left")
    cells(ax, 150, 444, [NOW], 18)
    label(ax, 176, 453, "on rank 1", SMALL, ha="left")
    cells(ax, 280, 444, [NEUTRAL], 18)
    label(ax, 306, 453, "the same on both", SMALL, ha="left")
    label(
        ax, 20, 482, "The sum of the two is added to the stream, on both ranks.", SMALL, ha="left"
    )
    return ax


EXPERTS = (KEPT, NOW, WASTED, WHITE)
CHOICES = ((2, 0), (1, 2), (0, 1), (2, 1))  # of four tokens, two each; nobody takes the last


def experts(height: int = 372) -> Axes:
    """Four tokens choose two of four experts each; then they are sorted by experts."""
    ax, size, top = canvas(height), 30, 62
    pairs = [(token, expert) for token, chosen in enumerate(CHOICES) for expert in chosen]
    for x, title in ((58, "tokens"), (160, "choices"), (325, "in order"), (550, "experts")):
        label(ax, x, 24, title, bold=True)
    for token, chosen in enumerate(CHOICES):
        y = top + token * 2 * size
        cells(ax, 40, y + size / 2, [NEUTRAL], size, texts=[f"t{token}"])
        arrow(ax, (74, y + size), (126, y + size))
        for place, expert in enumerate(chosen):
            cells(ax, 130, y + place * size, [EXPERTS[expert]], 60, size, [f"t{token}, {expert}"])
    arrow(ax, (200, top + 4 * size), (284, top + 4 * size))
    label(ax, 242, top + 4 * size - 14, "sort", SMALL, SOFT)
    y, number = top, 0
    for expert, fill in enumerate(EXPERTS):
        own = [token for token, chosen in pairs if chosen == expert]
        for token in own:
            cells(ax, 295, top + number * size, [fill], 60, size, [f"t{token}, {expert}"])
            number += 1
        tall = max(1, len(own)) * size
        note = f"{len(own)} rows" if own else "is not read"
        box(ax, 440, y + 3, 220, tall - 6, f"expert {expert}: {note}", fill, size=SMALL)
        if own:
            arrow(ax, (360, y + tall / 2), (436, y + tall / 2))
        y += tall
    label(ax, WIDTH / 2, height - 22, "Each token then adds up what its two experts say.", SMALL)
    return ax


DIAGRAMS = [tensor_parallel, experts]

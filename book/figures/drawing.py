"""What the book's diagrams are drawn with.

A diagram is drawn in the pixels of a 700 pixel wide page, y downwards. Four colours, everywhere
with the same meaning: computed in this step, kept from before, wasted, and grey for the rest.
The same source gives the same bytes: no date, fixed ids, and text as outlines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "chapters"))

from plotting import AFTER, INK, SOFT, use_style

FIGURES = Path(__file__).resolve().parent
WIDTH = 700

NOW = "#F2A93B"  # computed in this step
KEPT = "#8EC5EA"  # computed before, and kept
WASTED = "#E38BB8"  # computed again, or memory that nobody can use
NEUTRAL = "#EDEEF0"
WHITE = "#FFFFFF"
PALE = "#B9BEC5"  # lines behind all else
PAPER = "#F8F9FA"  # the ground of a part that is opened up
KEPT_LINE = AFTER  # KEPT, where it is a thin line

TEXT, SMALL = 17, 15  # sizes in pixels at full width


def canvas(height: int) -> Axes:
    """A white page, WIDTH by `height` pixels, origin at the top left."""
    figure = Figure(figsize=(WIDTH / 96, height / 96), layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    return ax


def label(
    ax: Axes, x: float, y: float, text: str, size: float = TEXT, color: str = INK,
    ha: str = "center", bold: bool = False, turned: bool = False,
) -> None:  # fmt: skip
    """Text whose middle stands at height y."""
    style = {"fontsize": size * 0.75, "weight": "bold" if bold else "normal", "color": color}
    ax.text(x, y, text, ha=ha, va="center_baseline", rotation=90 if turned else 0, **style)


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str = "",
    fill: str = NEUTRAL, note: str = "", size: float = TEXT, edge: str = SOFT,
) -> None:  # fmt: skip
    """A rounded box with its name, and a smaller note under the name."""
    style = {"boxstyle": "round,pad=0,rounding_size=6", "facecolor": fill, "edgecolor": edge}
    ax.add_patch(FancyBboxPatch((x, y), width, height, **style))
    middle = y + height / 2
    label(ax, x + width / 2, middle - (9 if note else 0), text, size)
    if note:
        label(ax, x + width / 2, middle + 11, note, 14, SOFT)


def arrow(
    ax: Axes, *points: tuple[float, float], color: str = SOFT, width: float = 1.4, head: bool = True
) -> None:
    """A line through `points`, with a head at the last one."""
    xs, ys = zip(*points)
    ax.plot(xs[:-1], ys[:-1], color=color, linewidth=width)
    style = {"arrowstyle": "-|>" if head else "-", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(*points[-2:], color=color, linewidth=width, **style))


def line(ax: Axes, *points: tuple[float, float], color: str = PALE, width: float = 1.4) -> None:
    """A line through `points`."""
    arrow(ax, *points, color=color, width=width, head=False)


def cells(
    ax: Axes, x: float, y: float, fills: list[str], width: float, height: float = 0,
    texts: list[str] | None = None,
) -> None:  # fmt: skip
    """A row of cells, one a fill; square unless a height is given."""
    height = height or width
    for i, fill in enumerate(fills):
        left = x + i * width
        ax.add_patch(Rectangle((left, y), width, height, facecolor=fill, edgecolor=SOFT))
        if texts:
            label(ax, left + width / 2, y + height / 2, texts[i], SMALL)


def legend(ax: Axes, x: float, y: float, fill: str, text: str) -> None:
    """A swatch and what its colour means."""
    cells(ax, x, y - 9, [fill], 18)
    label(ax, x + 26, y, text, SMALL, ha="left")


def chain(
    ax: Axes, at: float, width: float, fill: str, start: float,
    parts: list[tuple[float, str, str]], end: float,
) -> None:  # fmt: skip
    """Boxes (y, name, note) below one another, with arrows from `start` through all to `end`."""
    for y, name, note in parts:
        if y > start:
            arrow(ax, (at, start), (at, y))
        height = 52 if note else 36
        box(ax, at - width / 2, y, width, height, name, fill, note, 16)
        start = y + height
    if end > start:
        arrow(ax, (at, start), (at, end))


def save(draw: Callable[[], Axes]) -> None:
    """Write a diagram as book/figures/<its name>.svg."""
    path = FIGURES / f"{draw.__name__}.svg"
    metadata = {"Date": None, "Creator": None, "Title": draw.__doc__}
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        use_style()
        matplotlib.rcParams.update({"savefig.bbox": None})  # the page as it is, no cropping
        draw().figure.savefig(path, format="svg", metadata=metadata)
    # path data has blanks at the ends of lines
    lines = map(str.rstrip, path.read_text(encoding="utf-8").splitlines())
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")

"""The book's plot style: one palette, one font size, one grid.

    from plotting import BEFORE, AFTER, LIMIT, chapter_color, use_style
    use_style()

Colours mean the same everywhere. A chapter has its own, from dark to light, so that a rung of the
ladder and a curve in a later chapter can be matched by eye, in print and by colour-blind readers.
"""

from __future__ import annotations

import matplotlib
from cycler import cycler

INK = "#22262B"  # text and axes
SOFT = "#5F6670"  # second-rank text
GRID = "#DDE0E4"

AFTER = "#1F6FB2"  # what the chapter's engine does
BEFORE = "#9AA3AE"  # what the last chapter's engine did
LIMIT = "#C2402D"  # what the hardware allows
EXTRA = ("#2F8F6B", "#8A5BB0", "#D08A1D")  # further series, in this order

# Viridis, its bright end left out; chapters after the twelfth share its colour.
CHAPTERS = (
    "#471365",
    "#472A7A",
    "#424186",
    "#39558C",
    "#31688E",
    "#29798E",
    "#238A8D",
    "#1E9B8A",
    "#26AD81",
    "#3FBC73",
    "#63CB5F",
    "#8ED645",
)

FONT_SIZE = 11
SIZE = (7.0, 3.6)  # inches: the width of the book's column


def chapter_color(chapter: int) -> str:
    """The colour of a chapter's engine, counted from 1."""
    return CHAPTERS[min(chapter, len(CHAPTERS)) - 1]


def use_style() -> None:
    """Set matplotlib's defaults to the book's; the same data then gives the same SVG bytes."""
    matplotlib.rcParams.update(
        {
            "figure.figsize": SIZE,
            "figure.dpi": 120,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "savefig.bbox": "tight",
            "svg.hashsalt": "nanovllm",
            "svg.fonttype": "path",  # the same letters on every machine
            "font.family": "DejaVu Sans",  # comes with matplotlib
            "font.size": FONT_SIZE,
            "axes.titlesize": FONT_SIZE + 1,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": FONT_SIZE,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.edgecolor": SOFT,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=[AFTER, BEFORE, LIMIT, *EXTRA]),
            "grid.color": GRID,
            "grid.linewidth": 0.8,
            "text.color": INK,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "xtick.labelsize": FONT_SIZE - 1,
            "ytick.labelsize": FONT_SIZE - 1,
            "legend.frameon": False,
            "legend.fontsize": FONT_SIZE - 1,
            "lines.linewidth": 2.0,
            "lines.markersize": 5,
        }
    )

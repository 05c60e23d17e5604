"""The diagrams of chapters 12 and 13: a server, and a batch before it. diagrams.py writes them."""

from __future__ import annotations

from matplotlib.axes import Axes

from drawing import KEPT, NEUTRAL, NOW, SMALL, SOFT, WHITE, arrow, box, canvas, label


def serving(height: int = 300) -> Axes:
    """Callers, the server's process with its event loop, the pipe, the engine's process."""
    ax = canvas(height)
    box(ax, 104, 14, 280, 274, "", NEUTRAL)
    label(ax, 244, 36, "server: one event loop", bold=True)
    box(ax, 492, 14, 200, 274, "", NEUTRAL)
    label(ax, 592, 36, "engine: one thread", bold=True)
    for i in range(3):
        y = 78 + 66 * i
        box(ax, 6, y, 62, 38, "caller", WHITE, size=SMALL)
        arrow(ax, (70, y + 12), (102, y + 12))
        arrow(ax, (102, y + 27), (70, y + 27))
    box(ax, 116, 70, 148, 56, "a route: body,\nsequences, Call", WHITE, size=SMALL)
    box(ax, 116, 176, 148, 56, "pieces: tokens,\ntext, events", KEPT, size=SMALL)
    box(ax, 284, 70, 88, 56, "send\n(a thread)", NOW, size=SMALL)
    box(ax, 284, 176, 88, 56, "receive,\nhand_out", KEPT, size=SMALL)
    arrow(ax, (266, 98), (282, 98))
    arrow(ax, (282, 204), (266, 204))
    arrow(ax, (374, 98), (502, 98))
    arrow(ax, (502, 204), (374, 204))
    label(ax, 438, 82, "Ask", SMALL, SOFT)
    label(ax, 438, 151, "the pipe", SMALL, bold=True)
    label(ax, 438, 222, "a step's News", SMALL, SOFT)
    box(ax, 504, 70, 176, 56, "take_asks:\nadd, forget", WHITE, size=SMALL)
    box(ax, 504, 176, 176, 56, "step, tell", KEPT, size=SMALL)
    arrow(ax, (560, 128), (560, 174))
    arrow(ax, (624, 174), (624, 128))
    label(ax, 244, 266, "HTTP, text, JSON", SMALL, SOFT)
    label(ax, 592, 266, "the LLM, the GPU", SMALL, SOFT)
    return ax


def batch(height: int = 300) -> Axes:
    """The way of a line to its row in the result."""
    ax = canvas(height)
    box(ax, 6, 40, 104, 56, "IN.jsonl", WHITE, "any size", size=SMALL)
    box(ax, 142, 40, 128, 56, "unanswered:\nlines to ask", WHITE, size=SMALL)
    box(ax, 302, 40, 110, 56, "readers,\nso many", NOW, size=SMALL)
    box(ax, 444, 40, 110, 56, "desk: the\nserver's app", WHITE, size=SMALL)
    box(ax, 586, 40, 108, 56, "engine", KEPT, "its process", size=SMALL)
    for start, end in ((112, 140), (272, 300), (414, 442), (556, 584)):
        arrow(ax, (start, 60), (end, 60))
    arrow(ax, (584, 80), (556, 80))
    arrow(ax, (442, 80), (414, 80))
    box(ax, 256, 176, 202, 56, "OUT.jsonl.journal", KEPT, "rows as they end", size=SMALL)
    box(ax, 586, 176, 108, 56, "OUT.jsonl", KEPT, "in order", size=SMALL)
    arrow(ax, (357, 98), (357, 174))
    label(ax, 366, 138, "note", SMALL, SOFT, ha="left")
    arrow(ax, (236, 98), (282, 174))
    label(ax, 262, 120, "faulty lines", SMALL, SOFT, ha="left")
    arrow(ax, (254, 204), (160, 98))
    label(ax, 190, 158, "is it there?", SMALL, SOFT, ha="right")
    arrow(ax, (460, 204), (584, 204))
    label(ax, 522, 190, "publish", SMALL, SOFT)
    label(ax, 357, 262, "only grows; the next run reads it first", SMALL, SOFT)
    label(ax, 694, 262, "once all are there", SMALL, SOFT, ha="right")
    return ax


DIAGRAMS = [serving, batch]

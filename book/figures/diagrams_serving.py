"""The diagram of chapter 12: two processes and the pipe between them. diagrams.py writes it."""

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


DIAGRAMS = [serving]

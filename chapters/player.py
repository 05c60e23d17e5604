"""A recording to page through: each step's blocks, and what each request brings.

    display(play(trace, still=4))

It is HTML, whose frames are all there. A script of the book shows one of them at a time; without
it, in print or in a notebook, the `still` one is to be seen. `player_schedule` and `player_softmax`
make other frames for the same `Player`.
"""

from __future__ import annotations

from html import escape

from plotting import INK
from recorder import CACHED, REQUESTS, SHARED, BlockUse, Step, Trace, state_of, tint


class Player:
    """What a notebook shows: frames, and above them a board that all of them share.

    A board's style may refer to `--at`, the number of the frame in view. `step` is what a reader
    who doesn't see the page is told that a frame is.
    """

    def __init__(self, frames: list[str], still: int, board: str = "", step: str = "step"):
        self.frames, self.board, self.step = frames, board, step
        self.still = min(still, len(frames) - 1)

    def _repr_html_(self) -> str:
        shown = (
            f'<div class="frame"{"" if i == self.still else " hidden"}>{frame}</div>'
            for i, frame in enumerate(self.frames)
        )
        told = f'data-still="{self.still}" data-step="{self.step}" style="--at:{self.still}"'
        return f'<div class="player" {told}>{self.board}{"".join(shown)}</div>'

    def __repr__(self) -> str:
        return f"{len(self.frames)} {self.step}s to page through"


def play(trace: Trace, still: int = 0) -> Player:
    """The steps of an engine that has blocks, the one of number `still` (from 0) in view."""
    return Player([frame(trace, number) for number in range(len(trace.steps))], still)


def frame(trace: Trace, number: int) -> str:
    """One step: its number, the pool at its end, and its requests."""
    names, step = trace.names(), trace.steps[number]
    colors = {seq_id: REQUESTS[n % len(REQUESTS)] for n, seq_id in enumerate(names)}
    uses = {use.block_id: use for use in step.blocks}
    free = BlockUse(-1, [], 0)
    pool = "".join(
        square(trace, block_id, uses.get(block_id, free), names, colors)
        for block_id in range(trace.num_blocks)
    )
    rows = "".join(
        f'<tr><td><b style="background:{tint(colors[i])};color:{INK}">{name}</b></td>'
        f"<td>{told(step, i)}</td></tr>"
        for i, name in names.items()
    )
    title = f"step {number + 1} of {len(trace.steps)}"
    return f'<p>{title}</p><div class="pool">{pool}</div><table>{rows}</table>'


def square(
    trace: Trace, block_id: int, use: BlockUse, names: dict[int, str], colors: dict[int, str]
) -> str:
    """A block: its number, whose it is, and how far it is filled, by the bar at its foot."""
    state = state_of(use)
    whose = names[state] if isinstance(state, int) else state
    if state == "shared":
        whose = " ".join(names[owner] for owner in use.owners)
    kinds = {"shared": SHARED, "cached": CACHED, "free": "#FFFFFF"}
    color = colors[state] if isinstance(state, int) else kinds[state]
    part = 100 * use.num_filled // trace.block_size
    style = f"background-color:{tint(color)};background-size:{part}% 0.35em;color:{INK};"
    style += f"background-image:linear-gradient({color},{color})"
    return f'<span style="{style}"><i>{block_id}</i>{escape(whose)}</span>'


def told(step: Step, seq_id: int) -> str:
    """What a request has to do with a step, in words."""
    words = []
    for part in step.parts:
        if part.seq_id == seq_id:
            last = part.start + part.num_tokens - 1
            which = f"tokens {part.start} to {last}" if part.num_tokens > 1 else f"token {last}"
            words.append(f"{'computes' if part.is_prefill else 'decodes'} {which}")
    if seq_id in step.preempted:
        words.append("gives its blocks back, and waits")
    elif seq_id in step.waiting:
        words.append("waits")
    if seq_id in step.finished:
        words.append("ends")
    return escape(", ".join(words)) or "–"

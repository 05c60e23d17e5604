"""What an engine did, step by step, and pictures of it.

    with record(llm) as trace:
        llm.generate(prompts, params)
    draw_pool(axis, trace)

It works on the engine of every chapter, without changing its code. A trace is plain data: pickle it
to compare two engines. A picture against steps never depends on how fast the machine was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil
from time import perf_counter
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from plotting import AFTER, BEFORE, EXTRA, FONT_SIZE, GRID, INK, LIMIT, SOFT

# Requests: told apart also by readers who confuse red with green, or blue with purple.
REQUESTS = (AFTER, EXTRA[2], EXTRA[0], "#4A1A80", "#72BFE8", "#E5C878", "#66401A", "#E08AAE")
SHARED, CACHED = INK, GRID
BARS = {"prefill": AFTER, "decode": "#A5C5E0"}
LINES: dict[str, dict[str, Any]] = {
    "waiting": dict(color=BEFORE, linewidth=1.5),
    "preempted": dict(color=LIMIT, linewidth=2, linestyle=(0, (2, 1))),
}


@dataclass
class Part:
    """What one sequence brings in one step."""

    seq_id: int
    start: int  # tokens that were in the cache before the step
    num_tokens: int  # tokens that it brings
    is_prefill: bool  # a chunk of a prompt, or of what a preempted sequence lost; else a decode


@dataclass
class BlockUse:
    """A block that is in some table or holds what can be found again."""

    block_id: int
    owners: list[int]  # the sequences whose tables it is in; none: free, but cached
    num_filled: int  # tokens in it at the end of the step


@dataclass
class Step:
    """One step of the engine; times in seconds since the trace began, recording left out."""

    start: float
    end: float | None = None  # None: it raised
    parts: list[Part] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # those that bring nothing
    preempted: list[int] = field(default_factory=list)  # those of them that it took blocks from
    finished: list[int] = field(default_factory=list)
    num_new_tokens: int = 0  # tokens that were sampled, and kept
    blocks: list[BlockUse] = field(default_factory=list)


@dataclass
class Trace:
    """All steps of a recording."""

    max_num_seqs: int
    block_size: int = 0  # 0: this engine has no blocks
    num_blocks: int = 0
    steps: list[Step] = field(default_factory=list)
    blocks_after: list[BlockUse] = field(default_factory=list)  # when the recording ended

    def names(self) -> dict[int, str]:
        """A letter for each sequence, in the order of their ids; numbers where these run out."""
        seq_ids = {i for step in self.steps for i in step.waiting}
        seq_ids |= {part.seq_id for step in self.steps for part in step.parts}
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if len(seq_ids) <= 26 else ""
        return {i: letters[n : n + 1] or str(n + 1) for n, i in enumerate(sorted(seq_ids))}


@contextmanager
def record(llm: Any) -> Iterator[Trace]:
    """Collect what the engine does in the `with` block.

    Until its end, `schedule` and `postprocess` of the engine, or of its scheduler, are replaced.
    """
    owner = getattr(llm, "scheduler", llm)
    manager = getattr(owner, "block_manager", None)
    trace = Trace(llm.config.max_num_seqs)
    if manager is not None:
        trace.block_size, trace.num_blocks = manager.block_size, manager.num_blocks
    schedule, postprocess = owner.schedule, owner.postprocess
    began = perf_counter()
    pending: deque[tuple[Any, Step]] = deque()  # scheduled and not yet accounted for

    def recorded_schedule() -> Any:
        nonlocal began
        step, running = Step(perf_counter() - began), set(owner.running)
        seqs = schedule()
        now = perf_counter()
        step.parts = [describe(seq) for seq in seqs if not seq.is_finished]
        idle = {*owner.running, *owner.waiting} - {*seqs}
        step.waiting = sorted(seq.seq_id for seq in idle if not seq.is_finished)
        step.preempted = [seq.seq_id for seq in owner.waiting if seq in running]
        step.blocks = list_blocks(owner, step.parts)
        trace.steps.append(step)
        pending.append((seqs, step))
        began += perf_counter() - now
        return seqs

    def recorded_postprocess(seqs: Any, token_ids: Any) -> Any:
        while pending and pending[0][0] is not seqs:
            pending.popleft()  # that step has raised
        before = [seq for seq in seqs if not seq.is_finished]
        grown = postprocess(seqs, token_ids)
        if pending:
            _, step = pending.popleft()
            step.end = perf_counter() - began
            step.finished = [seq.seq_id for seq in before if seq.is_finished]
            step.num_new_tokens = len(grown)
        return grown

    replaced = {"schedule": recorded_schedule, "postprocess": recorded_postprocess}
    originals = {name: vars(owner)[name] for name in replaced if name in vars(owner)}
    vars(owner).update(replaced)
    try:
        yield trace
    finally:
        for name in replaced:
            del vars(owner)[name]
        vars(owner).update(originals)
        trace.blocks_after = list_blocks(owner, [])


def describe(seq: Any) -> Part:
    """What a scheduled sequence brings: before chapter 5, all that is missing."""
    start = seq.num_computed_tokens
    missing = len(seq) - start
    is_prefill = missing > 1 or seq.num_completion_tokens == 0
    return Part(seq.seq_id, start, getattr(seq, "num_scheduled_tokens", missing), is_prefill)


def list_blocks(owner: Any, parts: list[Part]) -> list[BlockUse]:
    """The blocks that are not merely free, as they will be at the end of a step."""
    manager: Any = getattr(owner, "block_manager", None)
    uses: dict[int, BlockUse] = {}
    brought = {part.seq_id: part.num_tokens for part in parts}
    for seq in owner.running if manager is not None else ():
        num_tokens = seq.num_computed_tokens + brought.get(seq.seq_id, 0)
        for i, block_id in enumerate(getattr(seq, "block_table", ())):
            use = uses.setdefault(block_id, BlockUse(block_id, [], 0))
            use.owners.append(seq.seq_id)
            filled = min(max(num_tokens - i * manager.block_size, 0), manager.block_size)
            use.num_filled = max(use.num_filled, filled)
    for block in getattr(manager, "blocks", ()):  # from chapter 4 on
        if block.prefix is not None:
            uses.setdefault(block.block_id, BlockUse(block.block_id, [], manager.block_size))
    return [uses[block_id] for block_id in sorted(uses)]


def tint(color: str) -> str:
    """A colour, thinned with white."""
    red, green, blue = (1 - 0.3 * (1 - channel) for channel in to_rgb(color))
    return to_hex((red, green, blue))


def text_on(color: str) -> str:
    """A colour that can be read on a colour."""
    red, green, blue = to_rgb(color)
    return "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.6 else INK


def put_legend(ax: Axes, handles: list, columns: int) -> None:
    """A legend above the axes, where it covers no data."""
    style: dict[str, Any] = dict(
        handlelength=1.2, handletextpad=0.5, columnspacing=1.3, borderpad=0.2
    )
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **style)


def size_in_points(ax: Axes) -> tuple[float, float]:
    """About how wide and how high the axes are."""
    box, scale = ax.get_window_extent(), 72 / ax.figure.dpi
    return box.width * scale, box.height * scale


def state_of(use: BlockUse) -> int | str:
    """The one owner of a block, or why there is none."""
    if use.block_id < 0:
        return "free"
    if len(use.owners) == 1:
        return use.owners[0]
    return "shared" if use.owners else "cached"


def draw_pool(ax: Axes, trace: Trace) -> None:
    """Each block over the steps, in the colour of its owner; behind the last step, what is left.

    A block fills from the bottom: its pale part is reserved and empty.
    """
    names, style = trace.names(), dict[str, Any]()
    colors: dict[int | str, str] = {"shared": SHARED, "cached": CACHED}
    colors |= {seq_id: REQUESTS[n % len(REQUESTS)] for n, seq_id in enumerate(names)}
    num_after = max(1, len(trace.steps) // 30) if trace.blocks_after else 0
    states = [step.blocks for step in trace.steps] + [trace.blocks_after] * num_after
    free = BlockUse(-1, [], 0)
    columns = [{use.block_id: use for use in uses} for uses in states]
    found = {state_of(use) for uses in states for use in uses}
    width, height = size_in_points(ax)
    has_room = height / max(trace.num_blocks, 1) > 8
    for y in range(trace.num_blocks):
        left, low, high = 0.5, y - 0.42, y + 0.42
        for state, run in groupby([column.get(y, free) for column in columns], key=state_of):
            uses = list(run)
            right = left + len(uses)
            if state in names:
                edges = [left + i for i in range(len(uses) + 1)]
                tops = [low + (high - low) * use.num_filled / trace.block_size for use in uses]
                tops.append(tops[-1])
                ax.fill_between(edges, low, high, color=tint(colors[state]), linewidth=0)
                ax.fill_between(edges, low, tops, step="post", color=colors[state], linewidth=0)
            elif state != "free":
                ax.fill_between([left, right], low, high, color=colors[state], linewidth=0)
            if state in names and has_room and len(uses) * width > 14 * len(columns):
                dark = colors[state] if uses[0].num_filled > trace.block_size / 2 else "white"
                style = dict(color=text_on(dark), size=9, weight="bold", va="center_baseline")
                ax.text(left + 3 * len(columns) / width, y, names[state], **style)
            left = right
    ax.set(xlim=(0.5, max(len(columns), 1) + 0.5), ylim=(-0.5, max(trace.num_blocks, 1) - 0.5))
    ax.set(xlabel="step", ylabel="block")
    ax.locator_params(integer=True)
    ax.grid(False)
    if num_after:
        ax.axvline(len(trace.steps) + 0.5, color=SOFT, linewidth=0.8)
        style = dict(rotation=90, va="center", color=SOFT, size=FONT_SIZE - 1)
        ax.text(1.01, 0.5, "after the last step", transform=ax.transAxes, **style)
    handles = [Patch(color=AFTER, label="one request's tokens")]
    if not has_room and len(names) <= len(REQUESTS):
        handles = [Patch(color=colors[i], label=name) for i, name in names.items() if i in found]
    handles.append(Patch(color=tint(AFTER), label="empty slots"))
    for state, label in (("shared", "shared"), ("cached", "free, still cached")):
        if state in found:
            handles.append(Patch(color=colors[state], label=label))
    put_legend(ax, handles, 4 if has_room else 6)


def follow(steps: list[Step], seq_id: int) -> list[tuple[str | None, int]]:
    """What a request does in each step, and the number of tokens that a prefill brings."""
    cells, state = [], None
    for step in steps:
        part = next((part for part in step.parts if part.seq_id == seq_id), None)
        if part is not None:
            state = "prefill" if part.is_prefill else "decode"
        elif seq_id not in step.waiting:
            state = None
        elif seq_id in step.preempted:
            state = "preempted"
        elif state != "preempted":
            state = "waiting"
        cells.append((state, part.num_tokens if part and part.is_prefill else 0))
    return cells


def ends_of(steps: list[Step]) -> list[float]:
    """When steps ended, those left out that raised."""
    return [step.end for step in steps if step.end is not None]


def draw_timeline(ax: Axes, trace: Trace, x: str = "step") -> None:
    """A row for each request: when it waited, and what it brought in each step; x may be "time"."""
    names, steps = trace.names(), [step for step in trace.steps if step.end is not None]
    lefts = [n + 0.5 if x == "step" else step.start for n, step in enumerate(steps)]
    rights = [left + 1 for left in lefts] if x == "step" else ends_of(steps)
    first, last = min(lefts, default=0), max(rights, default=1)
    width, height = size_in_points(ax)
    point, row = (last - first) / width, height / max(len(names), 1)
    size, seen, style = FONT_SIZE - 2, set[str | None](), dict[str, Any]()
    for y, seq_id in enumerate(names):
        cells = follow(steps, seq_id)
        # One bar for each run of decodes, but for each chunk its own.
        key = [(state, n if state == "prefill" else 0) for n, (state, _) in enumerate(cells)]
        runs = [list(run) for _, run in groupby(range(len(cells)), key=key.__getitem__)]
        for run, after in zip(runs, [*runs[1:], [0]]):
            (state, num_tokens), left, right = cells[run[0]], lefts[run[0]], rights[run[-1]]
            seen.add(state)
            if state in LINES:
                ax.plot([left, right], [y, y], solid_capstyle="butt", **LINES[state])
            elif state is not None:
                style = dict(color=BARS[state], edgecolor="white", linewidth=0.6)
                ax.barh(y, right - left, 0.66, left, **style)
            if state == "prefill" and row > 1.5 * size:
                text, style = str(num_tokens), dict(size=size, va="center_baseline")
                room = 0.64 * size * len(text) * point
                if right - left > room:
                    ax.text((left + right) / 2, y, text, ha="center", color="white", **style)
                elif cells[after[0]][0] == "decode" and rights[after[-1]] - right > 1.5 * room:
                    ax.text(right + 2 * point, y, text, color=INK, **style)
        ends = [right for step, right in zip(steps, rights) if seq_id in step.finished]
        ax.vlines(ends, y - 0.36, y + 0.36, color=INK, linewidth=2, zorder=3)
    ax.set(xlim=(first, last + (last - first) / 80), ylim=(len(names) - 0.4, -0.6))
    ax.set(xlabel="step" if x == "step" else "time, s", ylabel="request")
    every = ceil(1.2 * FONT_SIZE / row)
    ax.set_yticks(range(len(names))[::every], list(names.values())[::every])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    handles: list[Artist] = [Patch(color=color, label=state) for state, color in BARS.items()]
    handles += [Line2D([], [], label=state, **LINES[state]) for state in LINES if state in seen]
    style = dict(marker="|", color=INK, markersize=13, markeredgewidth=2, linestyle="")
    put_legend(ax, [*handles, Line2D([], [], label="finished", **style)], 5)


def draw_occupancy(ax: Axes, traces: dict[str, Trace], x: str = "step") -> None:
    """How many sequences each step brings forward, and the mean; the last trace is the new one."""
    colors = [*[BEFORE, *EXTRA][: len(traces) - 1], AFTER]
    for order, (label, trace) in enumerate(traces.items()):
        steps = [step for step in trace.steps if step.end is not None]
        edges = [step.start for step in steps] + ends_of(steps[-1:])
        if x == "step":
            edges = [n + 0.5 for n in range(len(steps) + 1)]
        sizes = [len(step.parts) for step in steps]
        area = sum(n * (right - left) for n, left, right in zip(sizes, edges, edges[1:]))
        label = f"{label}: mean {area / (edges[-1] - edges[0]):.1f}"
        style: dict[str, Any] = dict(edgecolor=colors[order], linewidth=1.5)
        fill = dict(style, fill=True, facecolor=tint(colors[order]), label=label)
        ax.stairs(sizes, edges, zorder=2 - order / 9, **fill)
        ax.stairs(sizes, edges, zorder=2 + order / 9, **style)  # no line is lost under an area
    most = max(trace.max_num_seqs for trace in traces.values())
    ax.axhline(most, color=LIMIT, linestyle="--", linewidth=1.5, label="max_num_seqs")
    ax.set(xlim=(0, None), ylim=(0, 1.06 * most), ylabel="sequences in the step")
    ax.set_xlabel("step" if x == "step" else "time, s")
    put_legend(ax, ax.get_legend_handles_labels()[0], 3)

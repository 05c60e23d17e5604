"""A schedule to page through: which request brought how many tokens in which step.

    display(play_schedule(trace, budget=32, still=4))

All steps are columns of one board, over which a cursor moves; a frame tells one step in words.
"""

from __future__ import annotations

from html import escape

from player import Player
from plotting import AFTER, BEFORE, LIMIT
from recorder import BARS, Part, Step, Trace, follow

INK = "var(--pst-color-text-base, var(--jp-content-font-color1, #22262B))"
PAGE = "var(--pst-color-background, var(--jp-layout-color0, #FFFFFF))"
LINE = "center/100% 2px no-repeat"
LOOKS = {  # of a request in a step
    "prefill": f"background:{AFTER};color:#fff",
    "decode": f"background:{BARS['decode']}",
    "waiting": f"background:linear-gradient({BEFORE},{BEFORE}) {LINE}",
    "preempted": f"background:repeating-linear-gradient(90deg,{LIMIT} 0 4px,#0000 0 6px) {LINE}",
}
KEYS = {"prefill": "a prompt's tokens", "decode": "decode: one token"}
ENDS = f"border-right:3px solid {INK}"


def play_schedule(trace: Trace, budget: int, still: int = 0) -> Player:
    """The steps that ended, of an engine whose `max_num_batched_tokens` is `budget`."""
    names, steps = trace.names(), [step for step in trace.steps if step.end is not None]
    frames = [
        f"<p>step {n + 1} of {len(steps)}, {told(step, names, budget)}</p>"
        for n, step in enumerate(steps)
    ]
    return Player(frames, still, draw_board(steps, names, budget))


def told(step: Step, names: dict[int, str], budget: int) -> str:
    """What happens in a step, in words."""
    chunks = [part for part in step.parts if part.is_prefill]
    decodes = [part.seq_id for part in step.parts if not part.is_prefill]
    done = [f"{sum(part.num_tokens for part in step.parts)} of {budget} tokens"]
    done.append(does(decodes, names, "decode"))
    which = [
        f"{bold(names[part.seq_id])}{' computes' * (n == 0)} {span(part)}"
        for n, part in enumerate(chunks)
    ]
    done.append(", ".join(which))
    done.append(does(step.preempted, names, "give", " all blocks back, and waits"))
    done.append(does([i for i in step.waiting if i not in step.preempted], names, "wait"))
    done.append(does(step.finished, names, "end"))
    return ". ".join(filter(None, done)) + "."


def does(seq_ids: list[int], names: dict[int, str], verb: str, what: str = "") -> str:
    """A sentence about some requests, or none."""
    *others, last = [bold(names[i]) for i in sorted(seq_ids)] or [""]
    who = f"{', '.join(others)} and {last}" if others else last
    return f"{who} {verb}{'' if others else 's'}{what}" if seq_ids else ""


def span(part: Part) -> str:
    """Which tokens a request brings, the first of its text being 0."""
    last = part.start + part.num_tokens - 1
    return f"tokens {part.start} to {last}" if part.num_tokens > 1 else f"token {last}"


def bold(name: str) -> str:
    """As it stands in a sentence."""
    return f"<b>{escape(name)}</b>"


def draw_board(steps: list[Step], names: dict[int, str], budget: int) -> str:
    """Above, how far each step fills the budget; a row for each request; the steps' numbers.

    It needs no style sheet. The cursor is one column wide, and a veil lies over the steps that have
    not come yet; both depend on `--at`.
    """
    rows = [row(str(budget), [filling(step, budget) for step in steps])]
    for seq_id, name in names.items():
        ended = [seq_id in step.finished for step in steps]
        does_what = zip(follow(steps, seq_id), ended)
        rows.append(row(name, [cell(state, n, ends) for (state, n), ends in does_what]))
    marks = [n if n == 1 or n % 5 == 0 else "" for n in range(1, len(steps) + 1)]
    rows.append(row("", [f'<i class="name">{n}</i>' for n in marks]))
    # The last column is empty, so that the veil has a place behind the last step.
    columns = f"1.7em repeat({len(steps)},minmax(0,1fr)) 0"
    heights = f"2.8em repeat({len(names)},1.35em) 1.2em"
    cells = f"display:grid;grid-area:1/1;gap:2px 1px;grid-template:{heights}/{columns}"
    over = f"display:grid;grid-area:1/1;gap:1px;grid-template:auto/{columns}"
    veil = f"grid-area:1/calc(var(--at) + 3)/2/-1;margin:-2px;background:{PAGE};opacity:0.6"
    cursor = "grid-area:1/calc(var(--at) + 2)/2/calc(var(--at) + 3);margin:-2px;"
    cursor += f"border:2px solid {INK};z-index:1"
    layers = f'<div style="{cells}">{"".join(rows)}</div><div style="{over}">'
    layers += f'<i class="veil" style="{veil}"></i><i style="{cursor}"></i></div>'
    style = "display:grid;font-size:0.8em;line-height:1.35em;text-align:center"
    grid = f'<div class="grid" style="{style}" aria-hidden="true">{layers}</div>'
    return grid + legend({state for i in names for state, _ in follow(steps, i) if state})


def row(name: str, cells: list[str]) -> str:
    """Its name, its cells, and the column that is empty."""
    return f'<i class="name">{escape(name)}</i>{"".join(cells)}<i></i>'


def filling(step: Step, budget: int) -> str:
    """A bar: decodes below, prompts above, and a line where the budget ends."""
    decodes = sum(part.num_tokens for part in step.parts if not part.is_prefill)
    total = sum(part.num_tokens for part in step.parts)
    parts = f"{BARS['decode']} {100 * decodes / budget:.0f}%,{AFTER} 0 {100 * total / budget:.0f}%"
    style = f"background:linear-gradient(to top,{parts},#0000 0);border-top:1px solid {BEFORE}"
    return f'<i style="{style}"></i>'


def cell(state: str | None, num_tokens: int, ends: bool) -> str:
    """A request in a step."""
    style = ";".join(filter(None, [LOOKS.get(state or ""), ENDS * ends]))
    return f'<i style="{style}">{num_tokens or ""}</i>' if style else "<i></i>"


def legend(states: set[str]) -> str:
    """What the looks mean, of those that are there."""
    looks = {KEYS.get(state, state): look for state, look in LOOKS.items() if state in states}
    looks["ends"] = ENDS
    swatch = "display:inline-block;width:1.4em;height:0.9em;margin:0 0.4em 0 0"
    keys = (
        f'<span style="display:inline-block;margin-right:1.1em">'
        f'<i style="{swatch};{look}"></i>{name}</span>'
        for name, look in looks.items()
    )
    return f'<div class="legend" style="font-size:0.8em">{"".join(keys)}</div>'

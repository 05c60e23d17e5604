"""The online softmax to page through: what m, l and o are after each tile of scores.

    display(play_softmax(scores, values, tile=3, still=1))

It is computed here, one tile after the other, and compared with the softmax over all scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf

from player import Player
from plotting import BEFORE, INK
from recorder import BARS, tint

HEADS = ("s", "v", "m", "factor", "l", "o", "o / l", "softmax")


@dataclass
class State:
    """What is known after a tile."""

    scores: list[float]  # those of the tile
    values: list[float]
    m: float  # the largest score so far
    factor: float  # what l and o were multiplied by, before the tile's own terms came
    own: tuple[float, float]  # what the tile adds to l and to o
    l_sum: float
    o: float
    plain: float  # the softmax average over all scores so far, computed anew


def play_softmax(scores: list[float], values: list[float], tile: int, still: int = 0) -> Player:
    """One query's scores, and one channel of the values, `tile` of them at a time."""
    states = follow_tiles(scores, values, tile)
    frames = [table(states, n) + f"<p>{told(states, n)}</p>" for n in range(len(states))]
    return Player(frames, still, step="tile")


def follow_tiles(scores: list[float], values: list[float], tile: int) -> list[State]:
    """The states after each tile."""
    m, l_sum, o, states = -inf, 0.0, 0.0, []
    for at in range(0, len(scores), tile):
        s, v = scores[at : at + tile], values[at : at + tile]
        m, before = max(m, *s), m
        factor, weights = exp(before - m), [exp(score - m) for score in s]
        own = sum(weights), sum(w * value for w, value in zip(weights, v, strict=True))
        l_sum, o = l_sum * factor + own[0], o * factor + own[1]
        plain = average(scores[: at + tile], values[: at + tile])
        states.append(State(s, v, m, factor, own, l_sum, o, plain))
    return states


def average(scores: list[float], values: list[float]) -> float:
    """The plain softmax average, in several passes over all scores."""
    weights = [exp(score - max(scores)) for score in scores]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def table(states: list[State], number: int) -> str:
    """A row for each tile: those that have not come yet are pale."""
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    rows = []
    for n, state in enumerate(states):
        kind = "now" if n == number else "later" if n > number else ""
        style = {"now": "font-weight:bold", "later": "opacity:0.45"}.get(kind, "")
        color = BARS["decode"] if n == number else tint(BEFORE)
        weights = [exp(score - states[number].m) if n <= number else 0 for score in state.scores]
        cells = ["".join(box(s, w, color) for s, w in zip(state.scores, weights))]
        cells.append(" ".join(map(whole, state.values)))
        sums = (state.factor, state.l_sum, state.o, state.o / state.l_sum, state.plain)
        cells += [whole(state.m), *map(two, sums)]
        row = "".join(f"<td>{text}</td>" for text in cells)
        rows.append(f'<tr class="{kind}" style="{style}">{row}</tr>')
    return f'<table class="tiles"><tr>{head}</tr>{"".join(rows)}</table>'


def box(score: float, weight: float, color: str) -> str:
    """A score in a box that is filled as far as its weight, exp(score - m), goes."""
    fill = f"linear-gradient(to top,{color} {100 * weight:.0f}%,#fff 0)"
    style = f"display:inline-block;min-width:1.8em;background:{fill};color:{INK};"
    style += "border:1px solid #808080;text-align:center;font-weight:normal"
    return f'<span style="{style}">{whole(score)}</span>'


def told(states: list[State], number: int) -> str:
    """What a tile does, in words and with its numbers."""
    state = states[number]
    words = f"tile {number + 1} of {len(states)}: "
    if number == 0:
        was, l_sum, o = -inf, 0.0, 0.0
        words += "before it, m is −∞, and l and o are 0. "
    else:
        before = states[number - 1]
        was, l_sum, o = before.m, before.l_sum, before.o
        larger = state.m > was
        words += "a larger score, so what was there shrinks. " if larger else "no larger score. "
    factor = two(state.factor)
    words += f"The factor is {one_line(f'exp({whole(was)} − {signed(state.m)}) = {factor}')}. "
    sums = ("l", l_sum, state.own[0], state.l_sum), ("o", o, state.own[1], state.o)
    words += ", ".join(
        one_line(f"{name} = {factor} × {signed(old, two)} + {signed(own, two)} = {two(new)}")
        for name, old, own, new in sums
    )
    count = sum(len(one.scores) for one in states[: number + 1])
    mean = one_line(f"o / l = {two(state.o / state.l_sum)}")
    far = " so far" if number + 1 < len(states) else ""
    return f"{words}. {mean}, as is the softmax average of all {count} values{far}."


def one_line(formula: str) -> str:
    """A formula that is not broken."""
    return f'<span style="white-space:nowrap">{formula}</span>'


def two(value: float) -> str:
    """With two digits after the point, and a minus as wide as a plus."""
    return f"{value:.2f}".replace("-", "−")


def whole(value: float) -> str:
    """As short as it can be."""
    return "−∞" if value == -inf else f"{value:g}".replace("-", "−")


def signed(value: float, text: Callable[[float], str] = whole) -> str:
    """In brackets where it is negative."""
    return f"({text(value)})" if value < 0 else text(value)

"""Figures to page through say what is so, are whole without a script, and obey buttons and keys."""

from __future__ import annotations

import random
import re
from math import isclose
from pathlib import Path

import pytest
from browser import Tab

from player import Player
from player_schedule import play_schedule
from player_softmax import average, follow_tiles, play_softmax
from recorder import Part, Step, Trace

STATIC = Path(__file__).resolve().parents[1] / "book" / "_static"
SCORES, VALUES = [1, 3, 2, 3, 0, 4, 1, 0, 0, -1, 5], [4, -1, 4, 6, 0, 2, 7, 8, 1, 5, 1]


def schedule() -> Trace:
    """A is decoded while B comes in chunks, is preempted, and comes back; C waits behind it."""
    steps = [
        Step(0, 1, [Part(4, 0, 8, True)], waiting=[6]),
        Step(1, 2, [Part(4, 8, 1, False), Part(6, 0, 7, True)], waiting=[9]),
        Step(2, 3, [Part(4, 9, 1, False), Part(6, 7, 1, True)], waiting=[9]),
        Step(3, None, [Part(4, 10, 1, False)]),  # it raised
        Step(3, 4, [Part(4, 10, 1, False)], waiting=[6, 9], preempted=[6], finished=[4]),
        Step(4, 5, [Part(6, 0, 5, True), Part(9, 0, 3, True)], finished=[6, 9]),
    ]
    return Trace(max_num_seqs=3, steps=steps)


def text(html: str) -> str:
    return re.sub("<[^>]+>", "", html)


def test_a_frame_of_a_schedule_tells_what_each_request_does() -> None:
    frames = play_schedule(schedule(), budget=8).frames
    assert [text(frame) for frame in frames] == [
        "step 1 of 5, 8 of 8 tokens. A computes tokens 0 to 7. B waits.",
        "step 2 of 5, 8 of 8 tokens. A decodes. B computes tokens 0 to 6. C waits.",
        "step 3 of 5, 2 of 8 tokens. A decodes. B computes token 7. C waits.",
        "step 4 of 5, 1 of 8 tokens. A decodes. B gives all blocks back, and waits. C waits. "
        "A ends.",
        "step 5 of 5, 8 of 8 tokens. B computes tokens 0 to 4, C tokens 0 to 2. B and C end.",
    ]


def test_a_schedule_has_a_row_for_each_request_and_a_column_for_each_step() -> None:
    grid = play_schedule(schedule(), budget=8).board.partition('<div class="legend"')[0]
    bars, *rows = grid.split('<i class="name">')[1:5]
    for row in (bars, *rows):  # an empty column stands behind the last step
        assert len(re.findall("</i>", row)) == 1 + 5 + 1
    assert [re.findall(r">(\d+)</i>", row) for row in rows] == [["8"], ["7", "1", "5"], ["3"]]
    ends = [[m.start() for m in re.finditer("border-right", row)] for row in rows]
    assert [len(found) for found in ends] == [1, 1, 1]
    # Decodes below, prompts above, each in percent of the budget.
    filled = re.findall(r"#\w+ (\d+)%,#\w+ 0 (\d+)%", bars)
    assert filled == [("0", "100"), ("12", "100"), ("12", "25"), ("12", "12"), ("0", "100")]
    assert re.findall('class="name">([0-9]+)<', grid) == ["8", "1", "5"]  # of steps, every fifth


@pytest.mark.parametrize("seed", range(20))
def test_tiles_give_the_softmax_average_of_what_has_come(seed: int) -> None:
    dice = random.Random(seed)
    count, tile = dice.randint(1, 30), dice.randint(1, 9)
    scores = [dice.gauss(0, 300) for _ in range(count)]
    values = [dice.gauss(0, 5) for _ in range(count)]
    states = follow_tiles(scores, values, tile)
    assert len(states) == -(-count // tile)
    for n, state in enumerate(states):
        came = scores[: (n + 1) * tile]
        assert state.m == max(came) and isclose(state.o / state.l_sum, state.plain, abs_tol=1e-9)
        assert (state.factor == 1) == (n > 0 and state.m == states[n - 1].m) or state.factor < 1
    assert isclose(states[-1].plain, average(scores, values))


def test_a_frame_of_tiles_tells_the_sums_with_their_numbers() -> None:
    frames = [text(frame.rpartition("<p>")[2]) for frame in play_softmax(SCORES, VALUES, 3).frames]
    assert frames[0].startswith("tile 1 of 4: before it, m is −∞, and l and o are 0. ")
    assert frames[1] == (
        "tile 2 of 4: a larger score, so what was there shrinks. The factor is exp(3 − 4) = 0.37. "
        "l = 0.37 × 1.50 + 1.39 = 1.94, o = 0.37 × 1.01 + 4.21 = 4.58. "
        "o / l = 2.36, as is the softmax average of all 6 values so far."
    )
    assert "no larger score. The factor is exp(4 − 4) = 1.00." in frames[2]
    assert frames[3].endswith("as is the softmax average of all 11 values.")


def test_only_one_frame_is_to_be_seen_without_a_script() -> None:
    for player in (play_schedule(schedule(), 8, still=99), play_softmax(SCORES, VALUES, 3, 99)):
        last = len(player.frames) - 1
        html = player._repr_html_()
        shown = re.findall(r'<div class="frame"( hidden)?>', html)
        assert [not hidden for hidden in shown] == [n == last for n in range(last + 1)]
        assert f'style="--at:{last}"' in html  # the cursor of a board stands there, too


def open_tab(browser, folder: Path, player: Player, size: str, theme: str = "light") -> Tab:
    """A page of one player, with the book's script and styles and without its theme."""
    head = '<meta name="viewport" content="width=device-width"><meta charset="utf-8">'
    head += f'<link rel="stylesheet" href="{STATIC}/book.css"><script src="{STATIC}/book.js">'
    page = f"<!doctype html>{head}</script><body>{player._repr_html_()}"
    (folder / "page.html").write_text(page, "utf-8")
    return Tab(browser, f"file://{folder}/page.html", size, theme)


PLAYERS = [play_schedule(schedule(), 8, still=2), play_softmax(SCORES, VALUES, 3, still=1)]
IN_VIEW = "[...document.querySelectorAll('.frame')].findIndex((frame) => !frame.hidden)"


def move(tab: Tab, at: int) -> None:
    """Put the slider on a frame."""
    tab.see(f"document.querySelector('input').value = {at}")
    tab.see("document.querySelector('input').dispatchEvent(new Event('input'))")


@pytest.mark.parametrize("player", PLAYERS, ids=["schedule", "softmax"])
def test_keys_and_buttons_move_the_frame_and_the_cursor(browser, tmp_path, player) -> None:
    tab, at = open_tab(browser, tmp_path, player, "wide"), player.still
    try:
        assert tab.see(IN_VIEW) == at
        for key, code, by in ("Tab", 9, 0), ("Tab", 9, 0), ("ArrowRight", 39, 1), ("Home", 36, -9):
            for kind in ("rawKeyDown", "keyUp"):
                tab.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)
            at = max(at + by, 0)
            assert tab.see(IN_VIEW) == at, key
        tab.see("document.querySelector('button:last-of-type').click()")
        assert tab.see(IN_VIEW) == 1
        told = tab.see("document.querySelector('input').getAttribute('aria-valuetext')")
        assert told == text(player.frames[1].rpartition("<p>")[2])
        assert tab.see("document.querySelector('.player').style.getPropertyValue('--at')") == "1"
        labels = tab.see("[...document.querySelectorAll('button')].map((b) => b.ariaLabel)")
        assert labels == [f"one {player.step} back", f"one {player.step} on"]
        assert tab.events("Runtime.exceptionThrown") == []
    finally:
        tab.close()


def test_the_cursor_stands_on_the_column_of_the_step(browser, tmp_path) -> None:
    """In the first, in the last, and in between; a veil lies over all that is behind it."""
    box = "(one) => { const r = one.getBoundingClientRect(); return [r.left, r.right]; }"
    tab = open_tab(browser, tmp_path, PLAYERS[0], "phone", "dark")
    try:
        for at in (0, 2, 4):
            move(tab, at)
            cells = tab.see(f"[...document.querySelectorAll('.grid i')].map({box})")
            veil, cursor, column = cells[-2], cells[-1], cells[1 + at]  # after the bars' name
            assert cursor == pytest.approx([column[0] - 2, column[1] + 2], abs=0.6)
            assert veil[0] >= column[1] - 2.6 and veil[1] >= cells[5][1] - 0.6
    finally:
        tab.close()


@pytest.mark.parametrize("player", PLAYERS, ids=["schedule", "softmax"])
def test_a_player_fits_a_phone_and_does_not_jump(browser, tmp_path, player) -> None:
    tab = open_tab(browser, tmp_path, player, "phone", "dark")
    try:
        heights = set()
        for at in range(len(player.frames)):
            move(tab, at)
            heights.add(tab.see("document.querySelector('.player').offsetHeight"))
            assert tab.see("document.querySelector('.player').scrollWidth - innerWidth") <= 0
        assert len(heights) == 1
    finally:
        tab.close()

"""Exercises that check themselves: what is right passes, what is wrong is told, nothing else."""

import re
from pathlib import Path

import nbformat
import pytest
from exercise_solutions import ANSWERS, CELLS
from tried import tried

import exercises
from cells import Cell
from merge import Package
from stages import chapters, code, number, write, write_stage

CHAPTERS = Path(__file__).resolve().parents[1] / "chapters"


def asked() -> dict[str, int]:
    """Each exercise that a chapter says checks itself, and the chapter's number."""
    found: dict[str, int] = {}
    for path in chapters(CHAPTERS):
        for cell in nbformat.read(path, as_version=4).cells:
            for name in re.findall(r'tangle\.verify\("([\w-]+)"', cell.source):
                assert f":label: ex-{name}" in cell.source and name not in found, name
                found[name] = number(path)
    return found


def test_every_exercise_that_checks_itself_has_its_check_and_its_solution():
    assert set(asked()) == set(exercises.CHECKS) == {*ANSWERS, *CELLS}


@pytest.mark.parametrize("name", ANSWERS)
def test_right_answers_are_right_and_each_wrong_one_is_told(name):
    answers = ANSWERS[name]
    assert exercises.verify(name, **answers) == "right"
    for key, value in answers.items():
        wrong = (lambda a, b: a) if callable(value) else 1.5 * value + (value == 0)
        with pytest.raises(exercises.Wrong, match=r"is not|joining|makes no"):
            exercises.verify(name, **{**answers, key: wrong})
    with pytest.raises(exercises.Wrong, match="asks for"):
        exercises.verify(name)


def test_an_exercise_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(exercises.Wrong, match="no exercise 'nothing'.*kv-budget"):
        exercises.verify("nothing")


@pytest.mark.parametrize("is_solved", [True, False], ids=["solved", "as the chapter has it"])
@pytest.mark.parametrize("name", CELLS)
def test_a_changed_engine_passes_and_that_of_the_chapter_does_not(name, is_solved, tmp_path):
    cells = [Cell(source, "the solution", 1) for source in CELLS[name]] if is_solved else []
    stage = asked()[name]
    write_stage(stage, tmp_path)
    write(Package([*code(stage), *cells]).sources(), tmp_path)
    said = tried(tmp_path, name)
    assert said == "right" if is_solved else said.startswith("Wrong: "), said

"""How `make test` runs its parts, and which files of the suite at which stage."""

from __future__ import annotations

import re
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import run

import tangle


def test_what_is_left_out_somewhere_is_there():
    assert [name for name in run.LAWS_OF if not (run.SUITE / name).is_file()] == []
    assert [name for name in run.ALWAYS if not (run.SUITE / name).is_file()] == []
    assert [name for name in run.SLOW if not (run.ROOT / name).is_file()] == []
    for modules in run.LAWS_OF.values():
        assert any(re.match(f"nanovllm/({modules})", path) for path in tangle.stage()), modules


def test_a_file_runs_first_last_and_where_a_module_of_its_laws_becomes_what_the_last_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    changes = {1: "engine/block", 2: "layers/b", 3: "engine/model_runner", 5: "layers/b"}
    changes |= {4: "engine/scheduler", 6: "engine/scheduler", 7: "engine/block", 8: "serve/a"}
    changes |= {9: "layers/b"}

    def stage(k: int) -> dict[str, str]:
        return {f"nanovllm/{changes[i]}.py": str(i) for i in range(1, k + 1)}

    names = "from_stage_2/test_x.py", "from_stage_4/test_y.py", "from_stage_8/test_z.py"
    for name in (*names, run.ALWAYS[0]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.setattr(tangle, "stage", stage)
    monkeypatch.setattr(tangle, "last", lambda: 9)
    monkeypatch.setattr(run, "SUITE", tmp_path)
    monkeypatch.setattr(run, "LAWS_OF", {names[0]: run.POLICY, names[2]: "serve/"})
    stages = {
        name: [k for k in range(int(name[11]), 10) if name not in run.left_out(k)] for name in names
    }
    # At 6 and 7 modules become what they are at 9, where all of it is asked.
    assert stages["from_stage_2/test_x.py"] == [2, 4, 9]
    assert stages["from_stage_4/test_y.py"] == [4, 5, 9]
    assert stages["from_stage_8/test_z.py"] == [9]  # what it holds is at 9 what it is at 8
    assert not any(run.ALWAYS[0] in run.left_out(k) for k in range(1, 10))


def test_each_question_has_its_turn_and_at_some_stages_always():
    files = [f"from_stage_{k}/test_{name}.py" for k in (2, 7) for name in "abcdefghijklmnopqrst"]
    names = [f"{file}::test_{i}[{i}]" for file in files for i in range(20)]
    for one_in in (1, 3, 8, 12):
        for first in (8, 20):
            turns = [
                {name for name in names if run.is_asked(name, stage, one_in)}
                for stage in range(first, first + one_in)
            ]
            assert set().union(*turns) == {*names} and sum(map(len, turns)) == len(names)
            assert min(map(len, turns)) > 800 / one_in / 2
    assert all(run.is_asked(name, 7, 8) for name in names if "from_stage_7/" in name)
    assert all(run.is_asked(f"test_sampling.py::test_{i}", 1, 8) for i in range(100))
    assert all(run.is_asked(f"{run.ALWAYS[0]}::test_{i}", 5, 8) for i in range(100))


def test_parts_run_side_by_side_and_are_counted_in_their_order():
    both = threading.Barrier(run.WORKERS, timeout=30)  # passed by those alone that run together

    def job(number: int) -> run.Count:
        both.wait()
        return run.Count(passed=number)

    jobs = [partial(job, i) for i in range(2 * run.WORKERS)]
    assert [count.passed for count in run.side_by_side(jobs)] == [*range(2 * run.WORKERS)]


def test_a_part_that_hangs_is_stopped_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(run, "STEP_LIMIT_S", 1)
    sleep = "-c", "import time; print('began', flush=True); time.sleep(60)"
    assert run.check("a sleeper", sys.executable, *sleep) == run.Count(failed=1)
    told = capsys.readouterr().out
    assert "began" in told and "stopped after 1 s" in told and not run.groups


def test_one_that_breaks_ends_the_others(monkeypatch):
    """As Ctrl-C does."""

    def broken() -> run.Count:
        while not run.groups:
            time.sleep(0.01)
        raise KeyboardInterrupt

    sleeper = partial(run.check, "a sleeper", sys.executable, "-c", "import time; time.sleep(60)")
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run.side_by_side([sleeper, broken])
    assert time.perf_counter() - start < 30 and not run.groups

"""Which files of the conformance suite `make test` runs at which stage."""

from __future__ import annotations

import re

import pytest
import run

import tangle


def test_what_is_left_out_somewhere_is_there():
    assert [name for name in run.LAWS_OF if not (run.SUITE / name).is_file()] == []
    assert [name for name in run.SLOW if not (run.ROOT / name).is_file()] == []
    for modules in run.LAWS_OF.values():
        assert any(re.match("nanovllm/" + modules, path) for path in tangle.stage()), modules


def test_a_costly_file_runs_first_last_and_where_a_module_of_its_laws_changes(
    monkeypatch: pytest.MonkeyPatch,
):
    changes = {1: "engine/block", 2: "layers/b", 3: "engine/model_runner", 5: "layers/b"}
    changes |= {4: "engine/scheduler", 6: "layers/b"}

    def stage(k: int) -> dict[str, str]:
        return {f"nanovllm/{changes[i]}.py": str(i) for i in range(1, k + 1)}

    monkeypatch.setattr(tangle, "stage", stage)
    monkeypatch.setattr(tangle, "last", lambda: 6)
    monkeypatch.setattr(run, "LAWS_OF", {"from_stage_2/test_x.py": run.POLICY})
    assert [k for k in range(2, 7) if not run.left_out(k)] == [2, 4, 6]

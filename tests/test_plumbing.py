"""Chapter 0 stands alone: every later stage begins with what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tangle
from merge import dotted


def test_every_module_of_chapter_0_can_be_imported_before_any_other_chapter(tmp_path: Path) -> None:
    tangle.write_stage(0, tmp_path)
    modules = sorted(dotted(path) for path in tangle.stage(0))
    assert {"nanovllm.bench", "nanovllm.__main__", "nanovllm.engine.outputs"} <= {*modules}
    code = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)

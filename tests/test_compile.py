"""Every kernel compiles for GPUs with and without programmatic dependent launch.

A kernel for Hopper compiles for that alone, and with the versions of Triton that it is written for.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOR_HOPPER = {"prefill_hopper_kernel"}


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles(capability, tmp_path):
    sources = (HERE.parent / "nanovllm/kernels").glob("*.py")
    names = {
        name for path in sources for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
    }
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if capability != 90 or version("triton")[:4] not in ("3.6.", "3.7."):
        names -= FOR_HOPPER
    assert set(json.loads(done.stdout)) == names and len(names) >= 10


def test_kernels_are_compiled_together_and_run_afterwards(tmp_path):
    """While `compiled_together` nothing is launched; afterwards nothing is left to compile."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compile_together.py"), "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = ["add_rms_norm_kernel"] * 2 + ["silu_and_mul_kernel"]
    assert [sorted(x) for x in found["together"]] == [names, []]
    assert [sorted(x) for x in found["after"]] == [names, names]
    assert found["restored"]

"""Compile kernels side by side for a GPU that need not be there; print what happened, as JSON."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from triton.runtime.jit import JITFunction

launch = JITFunction.run
import compile_kernels  # noqa: E402 - it puts its own function in the place of a launch

from nanovllm.kernels.add_rms_norm import add_rms_norm  # noqa: E402
from nanovllm.kernels.jit import compiled_together  # noqa: E402
from nanovllm.kernels.silu_and_mul import silu_and_mul  # noqa: E402

made: list[str] = []
launched: list[str] = []


class Launcher:
    """In the place of the C function that launches a kernel."""

    def __init__(self, src, metadata):
        self.name = metadata.name
        made.append(self.name)

    def __call__(self, *args) -> None:
        launched.append(self.name)


def launch_all() -> None:
    """Two kernels, one of them in two variants."""
    x, ones = torch.zeros(3, 64), torch.ones(64)
    add_rms_norm(x, None, ones, 1e-6)
    add_rms_norm(x, x.clone(), ones, 1e-6)
    silu_and_mul(x)


if __name__ == "__main__":
    sys.argv[1:] = ["90"]
    compile_kernels.pretend()
    JITFunction.run = launch
    properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}
    compile_kernels.NoGPU.launcher_cls = Launcher
    compile_kernels.NoGPU.utils = SimpleNamespace(
        get_device_properties=lambda device: properties, load_binary=lambda *_: (0, 0, 9, 0, 1024)
    )
    torch.cuda.current_device, torch.cuda.device = lambda: 0, lambda device: nullcontext()
    with compiled_together():
        launch_all()
    together = [*made], [*launched]
    launch_all()
    same = JITFunction.run is launch
    print(json.dumps({"together": together, "after": (made, launched), "restored": same}))

"""Triton, and the question where a kernel runs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch

# Where there is no Triton for the system, the torch twins do all the work.
HAS_TRITON = find_spec("triton") is not None
ABSENT = SimpleNamespace(
    jit=lambda function=None, **_: function or (lambda f: f), constexpr=lambda value: value
)
triton: Any = import_module("triton") if HAS_TRITON else ABSENT
tl: Any = import_module("triton.language") if HAS_TRITON else ABSENT

_interpreted = False


@contextmanager
def interpreted() -> Iterator[None]:
    """Run kernels on CPU tensors too, in Triton's interpreter: slow, and exact enough to test.

    The environment needs TRITON_INTERPRET=1 before anything imports triton; else RuntimeError.
    """
    global _interpreted
    if not HAS_TRITON or not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    previous, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = previous


def is_interpreted() -> bool:
    """Do kernels run on CPU tensors at this moment?"""
    return _interpreted


def uses_triton(x: torch.Tensor) -> bool:
    """Does a kernel take this tensor: any on a GPU, and all while `interpreted`?"""
    return x.is_cuda or _interpreted


def overlaps(x: torch.Tensor) -> bool:
    """Can a kernel on this device be launched before the one in front of it has ended?

    Programmatic dependent launch: from compute capability 9.0 on.
    """
    return x.is_cuda and capability(x.device) >= (9, 0)


def is_hopper(x: torch.Tensor) -> bool:
    """Is this on a GPU of the generation of H100 and H200, which has instructions of its own?"""
    return x.is_cuda and capability(x.device) == (9, 0)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The generation of a GPU; a launch is too short to ask each time."""
    return torch.cuda.get_device_capability(device)


@cache
def num_processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; the interpreter plays a small one."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel start early, then wait until the one before has written its results.

    What a kernel does before this call overlaps the end of its predecessors. There it may read
    weights and the step's inputs, and nothing that a kernel of the step writes. (The embedding is
    torch's, and no kernel starts before its end; the inputs lie ready since before it.)
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


_compiles_only: ContextVar[bool] = ContextVar("compiles_only", default=False)
_lock = Lock()  # what a launch does is replaced for the whole process


@contextmanager
def compiled_together() -> Iterator[None]:
    """Kernels that this thread launches are compiled side by side, and none of them runs."""
    function = import_module("triton.runtime.jit").JITFunction
    launch, device, kernels = function.run, torch.cuda.current_device(), dict[int, Any]()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=warmup or _compiles_only.get(), **kwargs)
        if _compiles_only.get():
            kernels[id(kernel)] = kernel
        return kernel

    def make_ready(kernel: Any) -> None:
        compiled = kernel.result() if hasattr(kernel, "result") else kernel  # by another engine
        with torch.cuda.device(device):
            _ = compiled.run  # it is loaded, and the C function that launches it compiled

    with _lock, ThreadPoolExecutor() as pool:
        function.run, token = run, _compiles_only.set(True)
        try:  # a Triton that is too old for it compiles them one after the other
            with getattr(triton, "AsyncCompileMode", nullcontext)(pool):
                yield
        finally:
            _compiles_only.reset(token)
            function.run = launch
        list(pool.map(make_ready, kernels.values()))

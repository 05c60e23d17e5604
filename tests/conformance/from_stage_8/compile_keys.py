"""What Triton would compile, seen on a CPU: every launch stands for the variant that it needs.

A kernel is compiled anew where a compile-time value differs, the type of an argument, an integer
that is 1 or a multiple of 16, or a pointer that is aligned otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime.interpreter import InterpretedFunction

from nanovllm.kernels.jit import interpreted

OPTIONS = ("num_warps", "num_stages", "launch_pdl")


def variant(kernel: InterpretedFunction, args: tuple, kwargs: dict) -> tuple:
    """The kernel's name, and all that its compiled code depends on."""
    options = tuple(kwargs.get(name) for name in OPTIONS)
    given = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    plain = kernel.kwargs["do_not_specialize"] or ()
    parts = []
    for name, value in inspect.getcallargs(kernel.fn, *args, **given).items():
        is_constant = "constexpr" in str(kernel.fn.__annotations__.get(name))
        parts.append((name, value if is_constant else kind(value, name in plain)))
    return kernel.__name__, *parts, options


def kind(value, is_plain: bool) -> tuple:
    """The class of arguments that share compiled code with this one."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        width = 32 if -(2**31) <= value < 2**31 else 64
        return (width,) if is_plain else (width, value == 1, value % 16 == 0)
    return (type(value),)


@contextmanager
def compiling() -> Iterator[set[tuple]]:
    """The variants that are launched meanwhile. Nothing is computed: all token ids are 0."""
    found, run = set(), InterpretedFunction.run

    def noting(self, *args, grid, warmup, **kwargs):
        found.add(variant(self, args, kwargs))
        if args[0].dtype == torch.int64:
            args[0].zero_()  # the kernel's output

    InterpretedFunction.run = noting
    try:
        with interpreted():
            yield found
    finally:
        InterpretedFunction.run = run

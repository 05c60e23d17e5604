"""How long something takes, on a GPU or on a CPU, and with which model."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import tangle

ON_GPU = torch.cuda.is_available()
SHAPE = "qwen3-0.6b" if ON_GPU else None  # a published shape; None is the bundled model
ROUNDS = 5


@functools.cache
def _shape_folder(shape: str) -> tempfile.TemporaryDirectory:
    from nanovllm.bench import SHAPES

    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "config.json").write_text(json.dumps(SHAPES[shape]))
    return folder


def measured_model() -> dict:
    """Options of an LLM to measure with: `SHAPE` with random weights, or the bundled model.

    Time does not depend on the values of the weights, and the bundled model is too small to keep a
    GPU busy.
    """
    return {"model": _shape_folder(SHAPE).name, "load_format": "dummy"} if SHAPE else {}


def run_on_stage(stage: int, script: str, **values: object) -> str:
    """What a script prints that imports the package as of a chapter, in a process of its own.

    It finds `values` under their names, and `OPTIONS`, which are `measured_model()`.
    """
    known = "".join(f"{n} = {v!r}\n" for n, v in {"OPTIONS": measured_model(), **values}.items())
    with tempfile.TemporaryDirectory() as folder:
        tangle.write_stage(stage, Path(folder))
        path = os.pathsep.join([folder, str(Path(__file__).parent)])
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", known + script]
        return subprocess.check_output(command, env=environment, text=True)


def wall_seconds(function: Callable[[], object]) -> float:
    """Seconds of one call by the clock."""
    start = perf_counter()
    function()
    return perf_counter() - start


def device_seconds(function: Callable[[], object]) -> float:
    """Seconds that a GPU works during one call, waits left out; on a CPU `wall_seconds`."""
    if not ON_GPU:
        return wall_seconds(function)
    return sum(duration for _, _, duration in events(function)) / 1e6


def token_seconds(
    llm: Any,
    length: int,
    steps: int = 8,
    batch: int = 1,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> float:
    """Seconds for one more token of `batch` texts of `length` tokens; the median of some steps."""
    from nanovllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1 + steps, ignore_eos=True)
    for _ in range(batch):
        llm.add_request([5] * length, params)
    llm.step()  # the prompts
    times = []
    while not llm.is_finished():
        times.append(clock(llm.step))
    return statistics.median(times)


def seconds(function: Callable[[int], object], copies: int = 1) -> float:
    """Seconds of one call of `function(i)`, i from 0 to `copies` - 1; the median of five rounds.

    On a GPU the calls are recorded and replayed, so that nothing of the host is measured; give
    it as many copies of its data as outgrow the cache of the chip, if memory is what you measure.
    """
    function(0)
    if not ON_GPU:
        rounds = []
        for _ in range(ROUNDS):
            start = perf_counter()
            for i in range(copies):
                function(i)
            rounds.append((perf_counter() - start) / copies)
        return statistics.median(rounds)
    repeats = max(1, 20 // copies)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for i in range(copies):
                function(i)
    graph.replay()
    rounds = []
    for _ in range(ROUNDS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        rounds.append(began.elapsed_time(ended) / 1000 / (repeats * copies))
    return statistics.median(rounds)


def host_seconds(function: Callable[[], object], calls: int = 200) -> float:
    """Seconds that the host needs for one call, which is what launching it costs."""
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(calls):
        function()
    took = perf_counter() - start
    if ON_GPU:
        torch.cuda.synchronize()
    return took / calls


VIEWS = ("view", "reshape", "slice", "select", "transpose", "split", "unbind", "expand", "squeeze")


def moves_data(event: Any) -> bool:
    """Is this an operation of torch that was asked for, and not a view?"""
    return event.cpu_parent is None and not any(view in event.name for view in VIEWS)


@contextmanager
def trace(function: Callable[[], object], *kinds: ProfilerActivity) -> Iterator[profile]:
    """Run a function under torch's profiler, which talks, and is kept quiet in a `with`."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=kinds) as profiler:
            function()
            if ON_GPU:
                torch.cuda.synchronize()
        yield profiler


def events(function: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, start and duration in us of what the device does while a function runs.

    On a GPU these are kernels and copies; on a CPU the operations of torch that move data.
    """
    with trace(function, ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU) as profiler:
        found = [
            (event.name, event.time_range.start, event.time_range.elapsed_us())
            for event in profiler.events()
            if (event.device_type.name == "CUDA" if ON_GPU else moves_data(event))
        ]
    return sorted(found, key=lambda event: event[1])


def by_operation(function: Callable[[], object]) -> dict[str, float]:
    """Seconds that the device works for each operation of torch while a function runs."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with trace(function, *kinds) as profiler:
        averages = profiler.key_averages()
    spent = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    return {a.key: getattr(a, spent) / 1e6 for a in averages if a.key.startswith("aten::")}


def launches(function: Callable[[], object]) -> int:
    """How many kernels and copies (on a CPU, operations) the device runs for a function."""
    return len(events(function))


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries write to the process's stderr is lost for the length of a `with`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

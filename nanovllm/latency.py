"""How long requests wait for their tokens when they arrive at random times."""

import statistics
import time
from collections import deque
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING

from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.llm import LLM


def latencies(
    llm: "LLM", prompts: list[list[int]], params: list[SamplingParams], rate: float
) -> dict[str, float]:
    """Serve them, `rate` a second, in a Poisson process; milliseconds by what was waited for."""
    random, first, between, last = Random(2), list[float](), list[float](), dict[int, float]()
    times = accumulate(random.expovariate(rate) for _ in prompts)
    coming = deque(zip(times, prompts, params, strict=True))
    start = time.perf_counter()
    while coming or not llm.is_finished():
        while coming and coming[0][0] <= time.perf_counter() - start:
            due, prompt, wishes = coming.popleft()
            last[llm.add_request(prompt, wishes)] = due
        if llm.is_finished():
            time.sleep(0.0005)
            continue
        seqs, now = llm.step(), time.perf_counter() - start
        for seq in seqs:
            waits = first if seq.num_completion_tokens == 1 else between
            waits.append(now - last[seq.seq_id])
            last[seq.seq_id] = now
    return {**percentiles("first token", first), **percentiles("between tokens", between)}


def percentiles(name: str, waits: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    hundredths = statistics.quantiles(waits, n=100)
    return {f"{name} p50": 1000 * hundredths[49], f"{name} p99": 1000 * hundredths[98]}

"""The benchmark: one workload, its floor, and what the engine makes of it."""

import json
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.benchmark import Timer

from nanovllm.latency import latencies
from nanovllm.sampling_params import SamplingParams
from nanovllm.workloads import SHAPES, WORKLOADS, Workload

if TYPE_CHECKING:  # chapter 1 makes them
    from nanovllm.config import ModelConfig
    from nanovllm.llm import LLM


def benchmark(workload: Workload, repeats: int, **options: Any) -> dict:
    """Run the workload `repeats` times on a fresh engine; all figures, medians first."""
    from nanovllm.llm import LLM

    lengths = (sum(pair) for pair in zip(workload.input_len, workload.output_len, strict=True))
    longest = max(*lengths, sum(workload.single), workload.prefill[1] + 1)
    start = perf_counter()
    llm = LLM(max_model_len=longest, **options)
    construct = perf_counter() - start
    try:
        if llm.max_model_len < longest:
            raise ValueError(f"the workload needs {longest} tokens, the model {llm.max_model_len}")
        return {
            "machine": machine(llm),
            "workload": asdict(workload),
            "construct_s": construct,
            **measure(llm, workload, repeats),
        }
    finally:
        llm.exit()


def measure(llm: "LLM", workload: Workload, repeats: int) -> dict:
    """The engine's figures on a workload, beside what the hardware would allow."""
    vocab_size = llm.model_config.vocab_size
    prompts, params = workload.requests(vocab_size)
    num_outputs = [p.max_tokens or 0 for p in params]  # a workload leaves none open
    fill = Random(1)
    num_prefill, prefill_len = workload.prefill
    single_len, single_out = workload.single
    batch = [[fill.randrange(vocab_size) for _ in range(prefill_len)] for _ in range(num_prefill)]
    single = [fill.randrange(vocab_size) for _ in range(single_len)]
    first = workload.params(max_tokens=1)

    for shape in (prompts[:2], batch, single):  # warm up
        llm.generate(shape, first, use_tqdm=False)
    total = spread(repeats, lambda: seconds(llm, prompts, params))
    prefill = spread(repeats, lambda: seconds(llm, batch, first))
    first_token = spread(repeats, lambda: seconds(llm, single, first))
    stream = spread(repeats, lambda: seconds_per_token(llm, single, workload.params(single_out)))
    floor = floor_seconds(llm, prompts, num_outputs)
    return {
        "output_tokens": sum(num_outputs),
        "output_tokens_per_s": sum(num_outputs) / total["median"],
        "floor_s": floor,
        "floor_share": floor / total["median"],
        "prefill_tokens_per_s": num_prefill * prefill_len / prefill["median"],
        "time_to_first_token_ms": 1000 * first_token["median"],
        "single_stream_tokens_per_s": 1 / stream["median"],
        "peak_memory_bytes": peak_memory(llm),
        "latency_ms": latencies(llm, prompts, params, workload.rate) if workload.rate else {},
        "seconds": dict(workload=total, prefill=prefill, first_token=first_token, token=stream),
    }


def seconds(llm: "LLM", prompts: list, params: SamplingParams | list[SamplingParams]) -> float:
    """How long a call of `generate` takes on an engine that keeps nothing of earlier calls."""
    llm.reset()
    start = perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return perf_counter() - start


def seconds_per_token(llm: "LLM", prompt: list[int], params: SamplingParams) -> float:
    """The time between two tokens of a single request, its first token left out."""
    times = [perf_counter() for _ in llm.stream(prompt, params)]
    return (times[-1] - times[0]) / ((params.max_tokens or 2) - 1)


def spread(repeats: int, measurement: Callable[[], float]) -> dict[str, float]:
    """Median, least and most of several measurements."""
    values = [measurement() for _ in range(repeats)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def floor_seconds(llm: "LLM", prompts: list[list[int]], num_outputs: list[int]) -> float:
    """The least time that the hardware needs for the workload, whatever the engine.

    Every token but the last of each request is run once, and sees those before it; each output
    token takes the head once. All requests decode at once: as many steps as the longest has output
    tokens, each reading all weights, and each token the keys and values before it. Operations and
    bytes may overlap, so the longer of the two counts. The rates are measured on this machine.
    """
    config, lm_head = llm.model_config, llm.model_runner.model.lm_head.weight
    flops, read, head = 0, 0, config.vocab_size * config.hidden_size
    for prompt, num_output in zip(prompts, num_outputs, strict=True):
        num_tokens = len(prompt) + num_output - 1
        flops += layer_flops(config, num_tokens, num_tokens * (num_tokens + 1) // 2)
        flops += 2 * head * num_output
        read += sum(range(len(prompt) + 1, num_tokens + 1))  # decode steps
    read *= kv_bytes_per_token(config, lm_head.element_size())
    num_steps = max(num_outputs)
    running = [sum(n > step for n in num_outputs) for step in range(num_steps)]
    read += (weights_read(config, running) + num_steps * head) * lm_head.element_size()
    bandwidth, flop_rate = ceilings(lm_head.device, lm_head.dtype)
    num_gpus = getattr(llm.config, "tensor_parallel_size", 1)  # an option of chapter 10
    return max(read / bandwidth, flops / flop_rate) / num_gpus


def layer_flops(config: "ModelConfig", num_tokens: int, num_pairs: int) -> int:
    """Operations of the layers for so many tokens, which see so many tokens in all.

    Two for each weight of a matrix and each token; four for each pair of tokens, one of which sees
    the other, and each channel of each query head.
    """
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    matrices = config.hidden_size * (2 * q_size + 2 * kv_size) + int(config.mlp_weights())
    return config.num_hidden_layers * (2 * num_tokens * matrices + 4 * num_pairs * q_size)


def weights_read(config: "ModelConfig", running: list[int]) -> int:
    """How many weights of the layers are read, by steps that run so many requests."""
    more = sum(config.mlp_weights(number) - config.mlp_weights() for number in running)
    return len(running) * layer_flops(config, 1, 0) // 2 + int(config.num_hidden_layers * more)


def kv_bytes_per_token(config: "ModelConfig", element_size: int) -> int:
    """Bytes of one token's keys and values over all layers."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * element_size
    return config.num_hidden_layers * per_layer


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """This machine's bytes/s of a large copy (read plus written) and FLOP/s of a large product."""
    on_gpu = device.type == "cuda"
    source = torch.ones(2**30 if on_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    copy = fastest(lambda: target.copy_(source))
    product = fastest(lambda: a @ a)
    return 2 * source.numel() / copy, 2 * size**3 / product


def fastest(operation: Callable[[], object]) -> float:
    """Seconds of one of ten runs, one behind the other, so that no launch counts; best of three."""
    timer = Timer("run()", globals={"run": operation}, num_threads=torch.get_num_threads())
    return min(timer.timeit(10).mean for _ in range(3))


def peak_memory(llm: "LLM") -> int:
    """The most bytes that were in use: on the GPU, or of the whole process on a CPU."""
    if llm.model_runner.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine(llm: "LLM") -> dict[str, str]:
    """What the figures were measured on."""
    device = llm.model_runner.device
    on_gpu = device.type == "cuda"
    name = (
        torch.cuda.get_device_name(device) if on_gpu else f"cpu, threads: {torch.get_num_threads()}"
    )
    dtype = str(llm.model_runner.model.lm_head.weight.dtype).removeprefix("torch.")
    return {
        "device": name,
        "dtype": dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def run(
    workload_name: str | None, shape: str | None, repeats: int, as_json: bool, options: dict
) -> None:
    """The `bench` command: print the figures, as a table or as one JSON object."""
    if workload_name is None:
        on_gpu = torch.cuda.is_available() and options.get("device") != "cpu"
        workload_name = "standard" if on_gpu else "small"
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
            options = {**options, "model": folder, "load_format": "dummy"}
        figures = benchmark(WORKLOADS[workload_name], repeats, **options)
    figures = {"model": shape or options.get("model") or "bundled", **figures}
    figures["workload"]["name"] = workload_name
    print(json.dumps(figures) if as_json else table(figures))


def table(figures: dict) -> str:
    """The figures for a person to read."""
    at, work = figures["machine"], figures["workload"]
    num_prefill, prefill_len = work["prefill"]
    single_len, single_out = work["single"]
    took = figures["seconds"]["workload"]
    rows = [
        ("model", f"{figures['model']}, {at['dtype']}"),
        ("device", f"{at['device']}, torch {at['torch']}"),
        (
            "workload",
            f"{work['name']}: {work['num_requests']} requests, "
            f"{figures['output_tokens']:,} output tokens",
        ),
        ("output tokens/s", f"{figures['output_tokens_per_s']:,.0f}"),
        ("seconds", f"{took['median']:.2f} ({took['min']:.2f} to {took['max']:.2f})"),
        ("floor, seconds", f"{figures['floor_s']:.2f}: {figures['floor_share']:.1%} of it reached"),
        (
            f"prefill {num_prefill} x {prefill_len}, tokens/s",
            f"{figures['prefill_tokens_per_s']:,.0f}",
        ),
        (f"first token after {single_len}, ms", f"{figures['time_to_first_token_ms']:.1f}"),
        (f"one stream of {single_out}, tokens/s", f"{figures['single_stream_tokens_per_s']:,.0f}"),
        *((f"{name}, ms", f"{value:.1f}") for name, value in figures["latency_ms"].items()),
        ("engine built in, seconds", f"{figures['construct_s']:.1f}"),
        ("peak memory, GB", f"{figures['peak_memory_bytes'] / 1e9:.2f}"),
    ]
    return "\n".join(f"{name:<34}{value}" for name, value in rows)

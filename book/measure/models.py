"""The shapes of other models on a GPU, beside their floors: `python book/measure/models.py`.

Runs `nanovllm bench` on each shape and prints one JSON object a line; book/measure/models.jsonl
has what it printed on an H200.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nanovllm.bench import ceilings, kv_bytes_per_token, weights_read
from nanovllm.config import ModelConfig
from nanovllm.workloads import SHAPES


def bench(shape: str, repeats: int) -> dict:
    """What the benchmark says of a shape."""
    command = [sys.executable, "-m", "nanovllm", "bench", "--shape", shape, "--json"]
    command += ["--workload", "standard", "--repeats", str(repeats)]
    return json.loads(subprocess.check_output(command, text=True))


def row(shape: str, figures: dict, bandwidth: float) -> dict:
    """A line of the table; bandwidth: of memory, bytes a second."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
        config = ModelConfig.from_folder(Path(folder))
    prompt, out = figures["workload"]["single"]
    read = 2 * (weights_read(config, [1]) + config.vocab_size * config.hidden_size)
    read += (prompt + out / 2) * kv_bytes_per_token(
        config, 2
    )  # a token of the one stream, bfloat16
    stream = figures["single_stream_tokens_per_s"]
    return {
        "device": figures["machine"]["device"].removeprefix("NVIDIA "),
        "shape": shape,
        "standard": round(figures["output_tokens_per_s"], 1),
        "standard_s": round(figures["seconds"]["workload"]["median"], 2),
        "standard_share": round(figures["floor_share"], 4),
        "one_stream": round(stream, 1),
        "one_stream_floor": round(bandwidth / read, 1),
        "one_stream_share": round(stream * read / bandwidth, 4),
        "prefill": round(figures["prefill_tokens_per_s"]),
        "first_token_ms": round(figures["time_to_first_token_ms"], 2),
        "construct_s": round(figures["construct_s"], 1),
        "peak_GB": round(figures["peak_memory_bytes"] / 1e9, 1),
    }


def main() -> None:
    """Measure each shape, and print its line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=["llama-3.2-1b", "qwen2.5-7b"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for shape in args.shapes:
        figures = bench(shape, args.repeats)
        bandwidth, _ = ceilings(torch.device("cuda"), torch.bfloat16)
        print(json.dumps(row(shape, figures, bandwidth)), flush=True)


if __name__ == "__main__":
    main()

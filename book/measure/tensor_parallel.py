"""One engine on some GPUs: a request alone, a batch, a prefill, the standard workload.

    python book/measure/tensor_parallel.py SHAPE NUM_GPUS [ROW ...] >> tensor_parallel.jsonl

SHAPE: a published shape, with random weights. ROW: one_stream, batch_64, prefill, standard; all
without any. Tokens a second, medians of 3 (of 2 for the standard workload).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from nanovllm import LLM
from nanovllm.bench import seconds, seconds_per_token, spread
from nanovllm.workloads import SHAPES, WORKLOADS

params = WORKLOADS["standard"].params  # what all requests of the field's benchmark ask for


def rows(llm: LLM) -> dict[str, Callable[[], float]]:
    """What can be measured."""
    fill, vocab_size = Random(1), llm.model_config.vocab_size
    single, *short = ([fill.randrange(vocab_size) for _ in range(n)] for n in (512, *[128] * 64))
    long = [[fill.randrange(vocab_size) for _ in range(1024)] for _ in range(64)]
    prompts, all_params = WORKLOADS["standard"].requests(vocab_size)
    num_outputs = sum(p.max_tokens or 0 for p in all_params)
    llm.generate([single], params(8), use_tqdm=False)
    llm.generate(short, params(8), use_tqdm=False)

    def median(repeats: int, *call) -> float:
        return spread(repeats, lambda: seconds(llm, *call))["median"]

    return {
        "one_stream": lambda: (
            1 / spread(3, lambda: seconds_per_token(llm, single, params(256)))["median"]
        ),
        "batch_64": lambda: 64 * 256 / median(3, short, params(256)),
        "prefill": lambda: 64 * 1024 / median(3, long, params(1)),
        "standard": lambda: num_outputs / median(2, prompts, all_params),
    }


def main() -> None:
    """Measure, and print a line of JSON."""
    shape, num_gpus, *wanted = sys.argv[1:]
    options = {"max_num_seqs": 16, "gpu_memory_utilization": 0.95} if "32b" in shape else {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[shape]))
        llm = LLM(
            folder, load_format="dummy", max_model_len=2048,
            tensor_parallel_size=int(num_gpus), **options,
        )  # fmt: skip
    head = {"device": torch.cuda.get_device_name(), "shape": shape, "num_gpus": int(num_gpus)}
    found = {name: round(f(), 1) for name, f in rows(llm).items() if not wanted or name in wanted}
    print(json.dumps({**head, **found}))
    llm.exit()


if __name__ == "__main__":
    main()

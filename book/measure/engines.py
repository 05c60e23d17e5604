"""Several engines on the same requests: `python book/measure/engines.py ENGINE FOLDER [ROW ...]`.

ENGINE: nanovllm (this engine, or nano-vLLM, whichever is installed under that name) or vllm.
FOLDER: a checkpoint; with --dummy its config.json is enough. ROW: all without any. Prints one JSON
object a line: seconds, the median of three runs with other token ids each, and tokens a second.
The page 'How the numbers are measured' has what three engines gave on an H200.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from random import Random
from typing import Any

MAX_MODEL_LEN = 20_480
dice = Random(5)
Requests = tuple[list[list[int]], list[dict[str, Any]]]  # prompts, and what each asks for


def same(count: int, length: int, output: int, head: int = 0, **sampling: Any) -> Requests:
    """So many prompts of a length, behind `head` tokens that all share."""
    shared = tokens(head)
    prompts = [shared + tokens(length) for _ in range(count)]
    return prompts, [{"max_tokens": output, **sampling}] * count


def tokens(count: int) -> list[int]:
    """Random token ids, within every model's vocabulary."""
    return [dice.randrange(5, 1500) for _ in range(count)]


def standard() -> Requests:
    """The workload of this field: 256 requests, 100 to 1,024 tokens each way."""
    lengths = Random(0)
    prompts = [tokens(lengths.randint(100, 1024)) for _ in range(256)]
    return prompts, [{"max_tokens": lengths.randint(100, 1024)} for _ in range(256)]


ROWS: dict[str, Callable[[], Requests]] = {
    "standard": standard,
    "first token after 512": lambda: same(1, 512, 1),
    "one stream after 512": lambda: same(1, 512, 257),
    "prefill, 64 x 1,024": lambda: same(64, 1024, 1),
    "prefill, 1 x 16,384": lambda: same(1, 16_384, 1),
    "16 x 16,384, 256 out": lambda: same(16, 16_384, 256),
    "256 x (2,048 shared + 64), 128 out": lambda: same(256, 64, 128, head=2048),
    "2,048 x 8, 16 out": lambda: same(2048, 8, 16),
    **{f"batch {n}, 128, 256 out": lambda n=n: same(n, 128, 256) for n in (4, 16, 64, 256, 512)},
    "64 x 256, 256 out, top-p 0.9": lambda: same(64, 256, 256, top_p=0.9),
    "256 x 256, 128 out, top-k 20, top-p 0.95": lambda: same(256, 256, 128, top_k=20, top_p=0.95),
}


def run(module: Any, llm: Any, requests: Requests) -> float:
    """Seconds to answer the requests."""
    prompts, asked = requests
    common = {"temperature": 0.6, "ignore_eos": True}
    params = [module.SamplingParams(**common, **own) for own in asked]
    given = [{"prompt_token_ids": p} for p in prompts] if module.__name__ == "vllm" else prompts
    start = time.perf_counter()
    llm.generate(given, params, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    """Measure the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=["nanovllm", "vllm"])
    parser.add_argument("folder")
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--dummy", action="store_true", help="random weights")
    args = parser.parse_args()
    module = importlib.import_module(args.engine)
    options = {"load_format": "dummy"} if args.dummy else {}
    llm = module.LLM(args.folder, max_model_len=MAX_MODEL_LEN, max_num_seqs=512, **options)
    for name in args.rows or ROWS:
        run(module, llm, ROWS[name]())
        took = statistics.median(run(module, llm, ROWS[name]()) for _ in range(3))
        output = sum(own["max_tokens"] for own in ROWS[name]()[1])
        row = {"engine": args.engine, "row": name, "seconds": round(took, 4)}
        print(json.dumps({**row, "tokens_per_s": round(output / took, 1)}), flush=True)


if __name__ == "__main__":
    main()

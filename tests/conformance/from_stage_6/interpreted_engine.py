"""Serves requests through the Triton kernels on a CPU, in Triton's interpreter.

It is a program of its own, for TRITON_INTERPRET=1 must be set before anything imports triton.
Standard input is a JSON object with `model`, `options`, and `calls`: each a list of prompts and of
their sampling parameters. Standard output is the tokens of each call, and of all the cache's hits.
"""

import json
import sys

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.jit import interpreted

asked = json.load(sys.stdin)
with interpreted():
    llm = LLM(asked["model"], device="cpu", dtype="float32", **asked["options"])
    answers = []
    for prompts, params in asked["calls"]:
        params = [SamplingParams(**kinds) for kinds in params]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers.append([out["token_ids"] for out in outputs])
backend = llm.model_runner.backend
json.dump(
    dict(answers=answers, backend=backend, hits=llm.scheduler.block_manager.num_hit_tokens),
    sys.stdout,
)

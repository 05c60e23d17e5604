"""What scheduling costs, without a model. Run it by hand: python tests/bench_scheduler.py"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.pipeline import Pipeline
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

NUM_BLOCKS = 100_000
LENGTH = 1000
FOREVER = SamplingParams(max_tokens=10**6, ignore_eos=True)


class Sampled:
    """A step's result that is there."""

    def __init__(self, token_ids: list[int]):
        self.numbers = token_ids

    def token_ids(self) -> list[int]:
        return self.numbers

    def told(self, token_ids: list[int]) -> tuple:
        return ()


def steps(scheduler: Scheduler, number: int) -> tuple[list[float], list[float]]:
    """Milliseconds that schedule() and postprocess() take in each of so many steps."""
    schedule, postprocess, pipeline = [], [], Pipeline()
    for _ in range(number):
        start = perf_counter()
        seqs = scheduler.schedule()
        middle = perf_counter()
        pipeline.push(seqs, Sampled([seq.seq_id for seq in seqs]))
        scheduler.postprocess(*pipeline.pop())
        schedule.append(1e3 * (middle - start))
        postprocess.append(1e3 * (perf_counter() - middle))
    return schedule, postprocess


def decoding(num_seqs: int, block_size: int, cached: bool = True) -> Scheduler:
    """A scheduler with so many sequences, their prompts all computed."""
    config = Config(
        device="cpu",
        kvcache_block_size=block_size,
        max_num_batched_tokens=num_seqs * LENGTH,
        enable_prefix_caching=cached,
    )
    scheduler = Scheduler(config, NUM_BLOCKS, ())
    for number in range(num_seqs):
        prompt = list(range(number * LENGTH, (number + 1) * LENGTH))
        scheduler.add(Sequence(number, prompt, FOREVER, seed=0))
    steps(scheduler, 2)
    assert len(scheduler.running) == num_seqs and not scheduler.waiting
    return scheduler


def blocked(block_size: int, known_share: float, in_use: bool) -> tuple[float, float, float]:
    """A prompt of 32k tokens has no room: a step without it, its first step, its later ones.

    Of a share of it, the keys and values are in the cache. Are these in use, the prompt lacks one
    block; are they free, it lacks a half of them, which it would have to take for the rest.
    """
    scheduler = decoding(16, block_size)
    manager = scheduler.block_manager
    text = list(range(10**7, 10**7 + 32 * 1024))
    kept = Sequence(-1, text[: int(known_share * len(text))], FOREVER, seed=0)
    manager.allocate(kept)
    manager.cache_blocks(kept, len(kept))
    known = len(kept.prefixes)
    if not in_use:
        manager.deallocate(kept)
    lacking = manager.blocks_for(len(text)) - known
    free = lacking - 1 if in_use else lacking + known // 2 + NUM_BLOCKS // 100  # of them a reserve
    taken = (len(manager.free_blocks) - free) * block_size
    manager.allocate(Sequence(-2, [0] * taken, FOREVER, seed=0))
    before, _ = steps(scheduler, 20)
    scheduler.add(Sequence(10**6, text, SamplingParams(max_tokens=1), seed=0))
    (first,), _ = steps(scheduler, 1)
    later, _ = steps(scheduler, 50)
    assert len(scheduler.waiting) == 1 and scheduler.num_preemptions == 0
    return median(before), first, median(later)


def main() -> None:
    """Print both tables, in milliseconds."""
    print(f"256 sequences of {LENGTH:,} tokens decode, {NUM_BLOCKS:,} blocks; milliseconds a step")
    print(f"{'':36}{'schedule':>10}{'worst':>10}{'postprocess':>13}")
    for block_size in (16, 256):
        for cached in (True, False):
            schedule, postprocess = steps(decoding(256, block_size, cached), 300)
            name = f"blocks of {block_size}, prefix cache {'on' if cached else 'off'}"
            print(f"{name:36}{median(schedule):10.3f}{max(schedule):10.3f}", end="")
            print(f"{median(postprocess):13.3f}")
    print("\n16 sequences decode while a prompt of 32k tokens waits; milliseconds of schedule()")
    print(f"{'':36}{'without it':>10}{'its first':>10}{'later':>13}")
    for block_size in (16, 256):
        for share, in_use in ((0.0, True), (0.5, True), (0.5, False), (0.9, False)):
            name = f"blocks of {block_size}, {share:.0%} known"
            name += ", in use" * (in_use and share > 0) + ", free" * (not in_use)
            before, first, later = blocked(block_size, share, in_use)
            print(f"{name:36}{before:10.3f}{first:10.3f}{later:13.3f}")


if __name__ == "__main__":
    main()

"""What callers see when a rank is lost, and that nothing is left of an engine."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
from checkpoints import save_random
from memory import make_seq

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.parallel.ring import Reader, Writer
from nanovllm.parallel.workers import Workers

LONG = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = dict(num_attention_heads=4, num_key_value_heads=4)
    return save_random(tmp_path_factory.mktemp("lost"), shape)


def ranks(folder, size: int) -> LLM:
    options = dict(device="cpu", dtype="float32", kvcache_block_size=16, num_kvcache_blocks=40)
    return LLM(folder, tensor_parallel_size=size, **options)


def pids(llm: LLM) -> list[int]:
    return [process.pid for process in llm.model_runner.workers.processes]


def are_gone(numbers: list[int], seconds: float = 5.0) -> bool:
    """Do these processes end within some seconds?"""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{n}").exists() for n in numbers) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{n}").exists() for n in numbers)


@pytest.mark.parametrize(
    ("rank", "number", "named"),
    [
        (1, signal.SIGKILL, "killed by signal 9"),
        (3, signal.SIGKILL, "killed by signal 9"),
        (2, signal.SIGSEGV, "killed by signal 11"),
    ],
)
def test_a_killed_rank_is_named_and_all_end(folder, rank, number, named):
    llm, start = ranks(folder, 4), time.monotonic()
    workers = pids(llm)
    timer = Timer(0.3, os.kill, (workers[rank - 1], number))
    timer.start()
    with pytest.raises(RuntimeError, match=rf"rank {rank} was lost: {named}"):
        while True:
            llm.generate([[1, 2, 3]], LONG, use_tqdm=False)
    assert time.monotonic() - start < 10 and are_gone(workers)
    with pytest.raises(RuntimeError, match=f"rank {rank} was lost"):
        llm.generate([[1]], SHORT, use_tqdm=False)
    llm.exit()
    again = ranks(folder, 2)
    assert again.generate([[1]], SHORT, use_tqdm=False)
    again.exit()


def test_a_rank_that_hangs_is_given_up(folder):
    llm = ranks(folder, 2)
    (worker,) = pids(llm)
    os.kill(worker, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 was lost: it does not answer"):
        llm.generate([[1, 2, 3]], LONG, use_tqdm=False)
    assert time.monotonic() - start < 10 and are_gone([worker])
    llm.exit()


def test_a_rank_that_raises_says_what():
    workers = Workers(on_loss=lambda: None)
    workers.start([partial(int, "no number")], [])
    assert workers.is_lost.wait(30)
    assert workers.failure.startswith("rank 1 was lost: ValueError(")
    assert "no number" in workers.failure and "Traceback" in workers.failure
    workers.end()


def test_engines_leave_nothing(folder):
    """Ended, dropped or ended twice: no process and no file descriptor."""
    ranks(folder, 2).exit()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    first, second = ranks(folder, 2), ranks(folder, 4)
    workers = pids(first) + pids(second)
    found = [llm.generate([[5, 6]], SHORT, use_tqdm=False) for llm in (first, second)]
    assert found[0][0]["token_ids"] == found[1][0]["token_ids"]
    runner, seq = first.model_runner, make_seq([1, 2])
    seq.num_scheduled_tokens = 2
    first.exit()
    first.exit()
    with pytest.raises(RuntimeError, match="the ranks have ended"):
        runner.run([seq])  # by whoever has kept it
    del second, runner
    gc.collect()
    assert are_gone(workers)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


CALLER = """
import os, sys
from threading import Timer
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", num_kvcache_blocks=40,
          kvcache_block_size=16)
print(llm.model_runner.workers.processes[0].pid, flush=True)
params = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
if sys.argv[2] == "9":
    Timer(0.3, os.kill, (os.getpid(), 9)).start()
    while True:
        llm.generate([[1, 2]], params, use_tqdm=False)
for _ in range(3):
    Timer(0.3, os.kill, (os.getpid(), 2)).start()
    try:
        while True:
            llm.generate([[1, 2]], params, use_tqdm=False)
    except KeyboardInterrupt:
        print(len(llm.generate([[1, 2]], params, use_tqdm=False)[0]["token_ids"]), flush=True)
"""


@pytest.mark.parametrize("number", [2, 9])
def test_a_caller_that_is_killed_or_interrupted(folder, number):
    """Killed, it takes its workers along; after Ctrl-C the engine goes on."""
    package = Path(nanovllm.__path__[0]).parent
    command = [sys.executable, "-c", CALLER, str(folder), str(number)]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=100,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )  # fmt: skip
    worker, *lengths = map(int, ran.stdout.split())
    assert are_gone([worker])
    if number == 2:
        assert ran.returncode == 0 and lengths == [200] * 3, ran.stderr


def test_the_ring_keeps_order_and_bytes():
    """Messages of all lengths to three readers that lag behind, each a little."""
    writer = Writer(num_readers=3)
    readers = [Reader(os.dup(writer.memory), 3, n, os.dup(writer.ears[n])) for n in range(3)]
    sizes = [1, 0, 5000, 3, 70_000, 69_999, 2, 1_000_000, 10, 140_001] * 3
    messages = [bytes([i]) * size for i, size in enumerate(sizes)]
    for at, message in enumerate(messages):
        writer.write_shm(message)
        for n, reader in enumerate(readers):
            if at >= n:  # reader n is n messages behind
                assert reader.read_shm() == messages[at - n]
    for n, reader in enumerate(readers):
        for message in messages[len(messages) - n :]:
            assert reader.read_shm() == message
    writer.close()
    for reader in readers:
        with pytest.raises(EOFError):
            reader.read_shm()
        reader.close()
        os.close(reader.ear)

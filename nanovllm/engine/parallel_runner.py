"""Rank 0's runner, which leads those of the other ranks; and what these do."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import current_thread, main_thread
from weakref import finalize

import numpy as np
import torch

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.result import Result
from nanovllm.engine.step_inputs import Step
from nanovllm.layers.attention import choose_backend
from nanovllm.parallel.group import Group, join, open_store, set_group
from nanovllm.parallel.ring import Reader, Writer
from nanovllm.parallel.workers import Workers


@dataclass(slots=True)
class Job:
    """What a worker does: build its part of the model, then launch what rank 0 launches."""

    rank: int
    config: Config
    model_config: ModelConfig
    folder: Path
    max_model_len: int
    port: int
    memory: int
    ear: int

    def __call__(self) -> None:
        size = self.config.tensor_parallel_size
        config, store = on_own_device(self.config, self.rank), open_store(self.port)
        ring = Reader(self.memory, size - 1, self.rank - 1, self.ear)
        group = Group(self.rank, size, config.torch_device, ring.came)
        if group.device.type == "cuda":
            torch.cuda.set_device(group.device)  # this process is the rank's alone
        store.set(f"rank {self.rank}", "is here")
        join(group, store)
        with set_group(group):
            shape = self.model_config.shard(size)
            runner = ModelRunner(config, shape, self.folder, self.max_model_len)
        while True:
            runner.launch(runner.packer.unpack(ring.read_shm()))


def on_own_device(config: Config, rank: int) -> Config:
    """The options for a rank, whose GPU has its number; ValueError where there is none."""
    if config.torch_device.type != "cuda":
        return config
    size, there = config.tensor_parallel_size, torch.cuda.device_count()
    if size > there:
        raise ValueError(f"tensor_parallel_size={size} needs as many GPUs, and there are {there}")
    return replace(config, device=f"cuda:{rank}")


PATIENCE = timedelta(seconds=6)  # with a rank that does not come to a sum


def end_ranks(workers: Workers, ring: Writer, group: Group) -> None:
    """Tell the workers to end, wait until they have, and give back what was shared."""
    workers.is_ending = True
    ring.close()
    workers.end()
    group.abort()
    if group.exchange is not None:
        group.exchange.close()
    group.link = group.exchange = None


@dataclass(slots=True)
class WatchedResult(Result):
    """What a step samples, with an eye on the ranks that it comes from."""

    runner: "ParallelRunner | None" = None

    def token_ids(self) -> list[int]:
        """One new token id for each sequence; RuntimeError where a rank is lost meanwhile."""
        if self.done is not None and self.runner is not None:
            with self.runner.workers_or_error():
                self.wait(self.runner, self.done)
        return self.sampled.tolist()

    def wait(self, runner: "ParallelRunner", done: torch.cuda.Event) -> None:
        """Wait for the step; RuntimeError where a rank is lost, or does not come in time."""
        give_up = time.monotonic() + runner.group.patience.total_seconds()
        while not done.query():
            time.sleep(20e-6)
            runner.check_workers()
            if time.monotonic() > give_up:
                raise RuntimeError("timed out: a step does not end")
        runner.check_workers()  # after a loss nothing waits, and what came is not a sum


class ParallelRunner(ModelRunner):
    """Runs the first part of the model, and has the workers run the others."""

    def __init__(self, config: Config, model_config: ModelConfig, folder: Path, max_model_len: int):
        size = config.tensor_parallel_size
        shape, store, self.is_leading = model_config.shard(size), open_store(), False
        own, self.ring = on_own_device(config, 0), Writer(size - 1)
        self.group = Group(0, size, own.torch_device, self.ring.came)
        rest = config, model_config, folder, max_model_len, store.port, self.ring.memory
        jobs = [Job(rank, *rest, self.ring.ears[rank - 1]) for rank in range(1, size)]
        fds, self.workers = [self.ring.memory, *self.ring.ears], Workers(self.group.abort)
        self.end_workers = finalize(self, end_ranks, self.workers, self.ring, self.group)
        with self.workers_or_error():
            self.workers.start(jobs, fds, num_threads=max(1, torch.get_num_threads() // size))
            while not store.check([f"rank {rank}" for rank in range(1, size)]):
                self.check_workers()
                time.sleep(0.01)
            join(self.group, store)
            with set_group(self.group):
                super().__init__(own, shape, folder, max_model_len)
            self.check_workers()
        self.group.patience, self.is_leading = PATIENCE, True

    def launch(self, step: Step) -> Result:
        """Have every rank run a step; a RuntimeError that names the rank where one is lost."""
        if not self.is_leading:  # each rank warms up by itself
            return ModelRunner.launch(self, step)
        with interrupts_wait(), self.workers_or_error():
            self.check_workers()
            self.ring.write_shm(step.to_bytes(), self.check_workers)
            return ModelRunner.launch(self, step)

    def check_workers(self) -> None:
        """RuntimeError where a rank has been lost, and after the end."""
        if self.workers.failure or self.workers.is_ending:
            raise RuntimeError(self.workers.failure or "the ranks have ended")

    @contextmanager
    def workers_or_error(self) -> Iterator[None]:
        """End all ranks after an error, and raise its cause."""
        try:
            yield
        except BaseException as error:
            if self.is_leading and not isinstance(error, Exception):
                raise  # Ctrl-C while a result is awaited: the ranks are in step
            if "imed out" in str(error):  # gloo's words, and ours: a rank has not come
                seen = self.ring.came[1:] + self.ring.read  # a recorded step counts no exchanges
                late = " or ".join(str(rank + 1) for rank in np.flatnonzero(seen == seen.min()))
                self.workers.lose(late, "it does not answer")
            if not self.workers.is_ending:
                error = self.workers.explain(error)
                self.workers.kill()
                self.end_workers()
            raise error from error.__cause__

    def exit(self) -> None:
        """End the workers, and let go of what this rank holds."""
        self.end_workers()
        ModelRunner.exit(self)

    def read_sampled(self, step: Step) -> Result:
        """Ask for the step's tokens, to be read when they are there."""
        result = ModelRunner.read_sampled(self, step)
        return WatchedResult(result.sampled, result.done, runner=self)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Put Ctrl-C off until the end of a `with`: the ranks must not part in the middle of a step."""
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before is None:  # no exception can come
        yield
        return
    arrived: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *args: arrived.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)


def make_runner(
    config: Config, model_config: ModelConfig, folder: Path, max_model_len: int
) -> ModelRunner:
    """What runs a model on one device, or on several."""
    size, backend = config.tensor_parallel_size, choose_backend(config, model_config.head_dim)
    if config.batch_invariant and (size > 1 or backend != "triton"):
        raise ValueError(
            "batch_invariant=True needs this project's kernels on one GPU, got "
            f"attention_backend={backend!r} and tensor_parallel_size={size}"
        )
    runner = ParallelRunner if size > 1 else ModelRunner
    return runner(config, model_config, folder, max_model_len)

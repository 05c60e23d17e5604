"""Several engines for one batch file, each an actor on Ray."""

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from nanovllm.serve.batch_desk import Desk, Note, drain, width_of
from nanovllm.serve.batch_rows import Reply, Row
from nanovllm.serve.client import EngineClient
from nanovllm.serve.engine_process import in_process
from nanovllm.serve.settings import BatchConfig


class Worker:
    """An engine and a desk, in a process that Ray starts, places, and starts again."""

    def __init__(self, options: dict[str, Any], model: str | None):
        (pipe,), self.process = in_process(options)
        try:
            self.client = EngineClient(pipe, max_open=sys.maxsize)
        except Exception:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                os._exit(1)  # Ray tries again
            raise
        self.desk, self.has_begun = Desk(self.client, model), False

    async def begin(self) -> None:
        """Returns once the engine is there."""
        if not self.has_begun:
            self.has_begun = True
            self.client.start()

    async def answer(self, rows: list[Row]) -> list[Reply]:
        """The lines that answer some rows."""
        await self.begin()
        try:
            return await self.desk.answer(rows)
        except RuntimeError:
            os._exit(1)  # the engine is lost: Ray makes this worker anew


STORE_BYTES = 128 << 20  # Ray's shared memory, where we start it


def connect(config: BatchConfig) -> None:
    """Join the cluster that is there, or start one on this machine."""
    own: dict[str, Any] = {}
    if config.address is None:
        cores = max(os.cpu_count() or 1, config.workers)
        own = {"include_dashboard": False, "object_store_memory": STORE_BYTES, "num_cpus": cores}
    ray.init(config.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)


def place(options: dict[str, Any], workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engines' options, and what each is to have; ValueError where there is too little."""
    device, there = options.get("device", "auto"), ray.cluster_resources()
    on_gpu = device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) > 0)
    kind, each = ("GPU", options.get("tensor_parallel_size", 1)) if on_gpu else ("CPU", 1)
    if workers * each > (has := int(there.get(kind, 0))):
        raise ValueError(f"workers={workers} need {workers * each} {kind}s, and Ray has {has}")
    needs = {"num_cpus": 1, "num_gpus": each if on_gpu else 0, "scheduling_strategy": "SPREAD"}
    return {**options, "device": "cuda" if on_gpu else "cpu"}, needs  # Ray says which GPU


PAUSE_S, MOST_LOOKS = 1.0, 300  # between two looks for a worker that is away; how many

CHUNK = 16  # rows
MOST_LOSSES = 3  # of a chunk, with nothing answered between them


class Pool:
    """Hands chunks of rows to workers; those of a worker that ends are done by another."""

    def __init__(self, workers: list[Any], depth: int):
        self.workers, self.num_answered = workers, 0
        self.free: asyncio.Queue[int] = asyncio.Queue()  # a worker's number, once for each permit
        for number in list(range(len(workers))) * depth:
            self.free.put_nowait(number)
        self.lost: dict[int, int] = {}  # workers that are away -> their permits that came back
        self.tasks: set[asyncio.Task] = set()

    async def begin(self) -> None:
        """Wait until all engines are there; RuntimeError where one can't be built."""
        try:
            await asyncio.gather(*(worker.begin.remote() for worker in self.workers))
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"a worker could not be started: {reason}") from error

    async def bring_back(self, number: int) -> None:
        """Free a worker's permits once it is there again, or has been away for long."""
        for _ in range(MOST_LOOKS):
            try:
                await self.workers[number].begin.remote()
                break
            except RayError:
                await asyncio.sleep(PAUSE_S)
        for _ in range(self.lost.pop(number)):
            self.free.put_nowait(number)

    def lose(self, number: int) -> None:
        """A permit of a worker that is away has come back."""
        if number not in self.lost:
            self.lost[number] = 0
            self.tasks.add(task := asyncio.create_task(self.bring_back(number)))
            task.add_done_callback(self.tasks.discard)
        self.lost[number] += 1

    async def answer(self, rows: list[Row]) -> list[Reply]:
        """The lines that answer a chunk; RuntimeError where workers end and nothing is answered."""
        losses, num_answered = 0, 0
        while losses < MOST_LOSSES:
            number = await self.free.get()
            if number in self.lost:
                self.lose(number)
                continue
            try:
                replies = await self.workers[number].answer.remote(rows)
            except RayTaskError:
                raise  # of our own code
            except RayError:
                losses = losses + 1 if self.num_answered == num_answered else 1
                num_answered = self.num_answered
                self.lose(number)
            else:
                self.num_answered += 1
                self.free.put_nowait(number)
                return replies
        raise RuntimeError(f"workers end at line {rows[0].line.number}, or soon after, every time")


async def answer_there(
    options: dict[str, Any], config: BatchConfig, rows: Iterator[Row], note: Note
) -> None:
    """Answer rows by as many engines as are asked for, on Ray."""
    width = width_of(options)
    size = max(1, min(CHUNK, width // 8))
    depth = -(-width // size)
    connect(config)
    try:
        options, needs = place(options, config.workers)
        kind = ray.remote(Worker).options(max_restarts=-1, max_concurrency=depth + 1, **needs)
        model = config.served_model_name
        pool = Pool([kind.remote(options, model) for _ in range(config.workers)], depth)
        await pool.begin()
        await drain(rows, note, pool.answer, depth * config.workers, size)
    finally:
        ray.shutdown()

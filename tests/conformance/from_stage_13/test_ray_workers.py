"""Batch files on several engines: Ray starts them, and no row depends on which one answers it.

NANOVLLM_KILLS says how many workers are killed in a run.
"""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from batch_files import (
    ENVIRONMENT,
    children,
    command_of,
    descendants,
    finish,
    journal_of,
    question,
    rows_of,
    start,
    text_of,
    wait_until,
    whole_entries,
    write,
)

from nanovllm import SamplingParams

pytest.importorskip("ray")
from ray.exceptions import RayActorError

from nanovllm.serve import workers as workers_room

KILLS = int(os.environ.get("NANOVLLM_KILLS", 2))
TWO = "--workers", "2", "--device", "cpu", "--dtype", "float32"


def workers(driver: int) -> list[int]:
    """The workers of a run that have an engine."""
    found = [pid for pid in descendants(driver) if command_of(pid).startswith("ray::Worker")]
    return [pid for pid in found if engine_of(pid)]


def engine_of(worker: int) -> int | None:
    """The process of a worker's engine."""
    found = [pid for pid in children(worker) if "spawn_main" in command_of(pid)]
    return found[0] if found else None


def check(target, lines, llm):
    """Every line has one row, in its place, with the text of the offline engine."""
    rows = rows_of(target)
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in lines]
    params = [SamplingParams(temperature=0, max_tokens=x["body"]["max_tokens"]) for x in lines]
    outputs = llm.generate([x["body"]["prompt"] for x in lines], params, use_tqdm=False)
    assert [text_of(row) for row in rows] == [output["text"] for output in outputs]


def test_two_workers_give_the_rows_of_one(tmp_path, llm):
    lines = [question(number) for number in range(80)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = start(source, target, *TWO, "--max-num-seqs", "8")
    most = [0]

    def have_begun():
        most[0] = max(most[0], len(workers(process.pid)))
        return most[0] == 2

    wait_until(have_begun, process)
    told = finish(process)
    assert most == [2] and told == "[80 rows: 0 were there, 80 are new, 0 of these tell an error]"
    check(target, lines, llm)


def test_the_rows_of_a_killed_worker_are_done_by_another(tmp_path, llm):
    """Whichever worker is there is killed as soon as ten more rows are answered, or its engine."""
    lines = [question(number, max_tokens=40) for number in range(80 + 40 * KILLS)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process, choose = start(source, target, *TWO, "--max-num-seqs", "8"), random.Random(0)
    journal, num_killed, before = journal_of(target), 0, 0
    for kill in range(KILLS):
        wait_until(lambda b=before: len(whole_entries(journal)) > b + 10, process)
        before = len(whole_entries(journal))
        if process.poll() is None:
            worker = choose.choice(workers(process.pid))
            os.kill(engine_of(worker) if kill % 3 == 2 else worker, signal.SIGKILL)
            num_killed += 1
    told = finish(process)
    assert num_killed == KILLS, f"the file was answered after {num_killed} kills"
    assert told.startswith(f"[{len(lines)} rows: 0 were there, {len(lines)} are new, 0 ")
    check(target, lines, llm)


def test_a_killed_driver_leaves_no_worker_and_the_file_goes_on(tmp_path, llm):
    lines = [question(number) for number in range(120)]
    source, target = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    process = start(source, target, *TWO, "--max-num-seqs", "2")
    wait_until(lambda: len(whole_entries(journal_of(target))) > 20, process)
    left = {worker: engine_of(worker) for worker in workers(process.pid)}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = len(whole_entries(journal_of(target)))
    assert 20 < there < 120 and left
    told = finish(start(source, target, "--max-num-seqs", "16"))
    assert told.startswith(f"[120 rows: {there} were there, {120 - there} are new")
    check(target, lines, llm)
    assert not [
        pid
        for pid in (*left, *left.values())
        if "ray::Worker" in command_of(pid) or "spawn" in command_of(pid)
    ]


INTRUDER = """
import sys, ray
ray.init(sys.argv[1], logging_level="error", log_to_driver=False)
print("inside")
"""
OURS = """
import os, subprocess, sys
from nanovllm.serve.ray_settings import prepare_ray
prepare_ray(None)
import ray
from nanovllm.serve.settings import BatchConfig
from nanovllm.serve.workers import connect
connect(BatchConfig(workers=2))
address = ray.get_runtime_context().gcs_address
theirs = {**os.environ, "RAY_NUM_REDIS_GET_RETRIES": "2"}
del theirs["RAY_AUTH_TOKEN"], theirs["RAY_AUTH_MODE"]
for environment in (theirs, dict(os.environ)):
    command = [sys.executable, "-c", sys.argv[1], address]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(ran.returncode != 0, "inside" in ran.stdout)
"""


def test_nobody_joins_a_cluster_of_ours_without_its_token():
    command = [sys.executable, "-c", OURS, INTRUDER]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert ran.stdout.splitlines() == ["True False", "False True"], ran.stderr[-2000:]


@pytest.fixture
def cluster():
    """The address of a cluster on this machine, and the environment to join it with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    options = f"--head --block --port={port} --num-cpus=2 --include-dashboard=false".split()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    head = subprocess.Popen(command, env=ENVIRONMENT | token, start_new_session=True, **pipes)
    told = iter(head.stdout.readline, "")
    assert any("Ray runtime started" in line for line in told)
    yield f"127.0.0.1:{port}", token
    head.terminate()
    head.communicate(timeout=60)


def test_a_cluster_that_is_there_is_used_and_goes_on(tmp_path, llm, cluster, monkeypatch):
    address, token = cluster
    for name, value in token.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    lines = [question(number) for number in range(40)]
    for name in ("first", "second"):
        source, target = write(tmp_path / "in.jsonl", lines), tmp_path / f"{name}.jsonl"
        process = start(source, target, *TWO, "--address", address)
        started = set()

        def look(process=process, started=started):
            started.update(map(command_of, descendants(process.pid)))

        wait_until(look, process)
        assert finish(process) == "[40 rows: 0 were there, 40 are new, 0 of these tell an error]"
        check(target, lines, llm)
        assert not any("raylet" in command for command in started), "it has a cluster of its own"


def test_more_workers_than_gpus_are_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", [question(1)])
    told = finish(start(source, tmp_path / "out.jsonl", "--workers", "99", "--device", "cuda"), 2)
    assert "workers=99 need 99 GPUs" in told or "no such GPU" in told


class Stub:
    """A worker whose process is away, or one that answers."""

    def __init__(self, is_there):
        self.is_there = is_there
        self.begin = self.answer = self

    async def remote(self, *asked):
        await asyncio.sleep(0)
        if not self.is_there:
            raise RayActorError
        return [f"answer to {row}" for row in asked[0]] if asked else None


def test_a_run_ends_where_no_worker_comes_back(monkeypatch):
    monkeypatch.setattr(workers_room, "PAUSE_S", 0.0)
    monkeypatch.setattr(workers_room, "MOST_LOOKS", 5)
    row = SimpleNamespace(line=SimpleNamespace(number=7))

    async def ask(*stubs):
        pool = workers_room.Pool(list(stubs), 2)
        return await asyncio.wait_for(asyncio.gather(*(pool.answer([row]) for _ in range(9))), 20)

    with pytest.raises(RuntimeError, match="workers end at line 7"):
        asyncio.run(ask(Stub(False), Stub(False)))
    assert asyncio.run(ask(Stub(False), Stub(True))) == [[f"answer to {row}"]] * 9

"""Several processes speak HTTP before one engine: callers can't tell, and they end together."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path

import httpx
import pytest
from serving import Command, events, is_running, text_of, until

from nanovllm.serve import start as start_module
from nanovllm.serve.client import Busy, EngineClient
from nanovllm.serve.engine_process import About, deaf
from nanovllm.serve.settings import ServeConfig

PROMPTS = [f"Once upon a time, {number} foxes" for number in range(40)]
BODY = {"max_tokens": 24, "temperature": 0, "stream": True}


@pytest.fixture
def command():
    started = []

    def start(*options: str) -> Command:
        started.append(Command("--dtype", "float32", *options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def processes(command: Command) -> list[int]:
    """All that were spawned for a server: the engine first, then those that speak HTTP."""
    found = []
    for pid in command.children():
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def num_sockets(pid: int) -> int:
    """How many sockets a process has open."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # it has been closed meanwhile
            links.append(os.readlink(link))
    return sum(link.startswith("socket:") for link in links)


def stream_all(port: int, **body) -> list[list[dict]]:
    """The events of all prompts, asked at once, each over a connection of its own."""

    async def ask() -> list[list[dict]]:
        bodies = [{"prompt": prompt, **BODY, **body} for prompt in PROMPTS]
        return await asyncio.gather(*(events(port, "/v1/completions", one) for one in bodies))

    return asyncio.run(ask())


def test_texts_are_those_of_one_engine_and_all_are_counted_wherever_one_asks(command, offline):
    server = command("--http-processes", "3")
    port = server.ready()
    engine, *beside = processes(server)
    fronts, most = [server.process.pid, *beside], {}
    idle = {pid: num_sockets(pid) for pid in fronts}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for pid in fronts:
                most[pid] = max(most.get(pid, 0), num_sockets(pid) - idle[pid])

    watcher = threading.Thread(target=watch)
    watcher.start()
    told = stream_all(port)
    done.set()
    watcher.join()
    assert all(most[pid] >= 3 for pid in fronts), most
    from nanovllm import SamplingParams

    outputs = offline.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), False)
    assert [text_of(one) for one in told] == [output["text"] for output in outputs]
    for _ in range(8):  # each time it is another connection
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        ends = [line for line in text.splitlines() if line.startswith("nanovllm_requests_total{")]
        assert sum(float(line.split()[-1]) for line in ends) == len(PROMPTS)
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


@pytest.mark.parametrize("number", [0, 1, 2])
def test_when_one_is_killed_all_end(command, number):
    """The first one, one beside it, or the engine."""
    server = command("--http-processes", "2")
    server.ready()
    everyone = [server.process.pid, *reversed(processes(server))]
    assert len(everyone) == 3
    os.kill(everyone[number], signal.SIGKILL)
    status, said = server.end()
    assert status == (-9 if number == 0 else 1)
    lost = ["", "a process that speaks HTTP has ended", "the engine has ended"][number]
    assert lost in said and "Traceback" not in said
    for pid in everyone:
        until(lambda pid=pid: not is_running(pid), "it ends, too")


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_lets_those_inside_finish_in_every_process(command, number, to_all):
    """Sent to the first process, or to all: as a terminal does, and many supervisors."""
    server = command("--http-processes", "2")
    port, ended = server.ready(), []
    asking = threading.Thread(target=lambda: ended.extend(stream_all(port, ignore_eos=True)))
    asking.start()
    until(lambda: "running 0" not in httpx.get(f"http://127.0.0.1:{port}/metrics").text, "it runs")
    everyone = [server.process.pid, *processes(server)]
    for pid in reversed(everyone) if to_all else everyone[:1]:
        os.kill(pid, number)
    asking.join(100)
    status, said = server.end()
    assert status == 0 and "Traceback" not in said
    assert [one[-1]["choices"][0]["finish_reason"] for one in ended] == ["length"] * len(PROMPTS)
    for pid in everyone:
        until(lambda pid=pid: not is_running(pid), "it ends, too")


def test_an_address_that_is_taken_is_shared_with_nobody(command):
    server = command("--http-processes", "2")
    port = server.ready()
    for others in ("1", "2"):
        second = command("--http-processes", others, "--port", str(port))
        status, said = second.end(100)
        assert status == 1 and "can't listen at 127.0.0.1" in said and "Traceback" not in said
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_an_address_is_taken_before_the_engine_is_there(command):
    """Two that begin at once: one has it, the other is told, and nobody is served by both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [command("--http-processes", "2", "--port", port) for _ in range(2)]
    until(lambda: any(one.process.poll() is not None for one in both), "one gives up")
    lost, kept = sorted(both, key=lambda one: one.process.poll() is None)
    status, said = lost.end(100)
    assert status == 1 and "can't listen at 127.0.0.1" in said
    assert kept.ready() == int(port)


@pytest.mark.parametrize("number", [0, 1], ids=["engine", "beside"])
def test_one_that_is_killed_before_the_engine_is_there_ends_all(command, number):
    server = command("--http-processes", "2")
    until(lambda: len(processes(server)) == 2, "all are started")
    everyone = processes(server)
    os.kill(everyone[number], signal.SIGKILL)
    status, said = server.end(100)
    assert status == 1 and "has ended" in said and "Traceback" not in said
    for pid in everyone:
        until(lambda pid=pid: not is_running(pid), "it ends, too")


def test_ctrl_c_before_the_engine_is_there_ends_all_quietly(command):
    server = command("--http-processes", "2")
    until(lambda: len(processes(server)) == 2, "all are started")
    everyone = [*processes(server), server.process.pid]
    for pid in everyone:
        os.kill(pid, signal.SIGINT)
    status, said = server.end(100)
    assert status == 130 and "Traceback" not in said
    for pid in everyone:
        until(lambda pid=pid: not is_running(pid), "it ends, too")


def test_ctrl_c_that_comes_while_a_process_is_started_is_not_lost():
    heard, before = [], signal.signal(signal.SIGINT, lambda *_: heard.append("Ctrl-C"))
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    try:
        with deaf():
            os.kill(os.getpid(), signal.SIGINT)
            process.start()
            assert not heard
        until(lambda: heard == ["Ctrl-C"], "it is heard here")
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert process.is_alive() and heard == ["Ctrl-C"]
    finally:
        signal.signal(signal.SIGINT, before)
        process.kill()
        process.join()


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_right_behind_the_start_of_a_process_ends_it_with_the_others(monkeypatch, number):
    """It has been started, and nobody had the time to note it."""
    started, start = [], multiprocessing.process.BaseProcess.start

    def interrupted(process) -> None:
        start(process)
        started.append(process)
        if len(started) == number:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            start_module.serve({"device": "cpu"}, ServeConfig(port=0, http_processes=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 2
    until(lambda: multiprocessing.active_children() == [], "all end")


def test_each_process_takes_its_share_and_a_single_call_may_have_all():
    ours, theirs = Pipe()
    theirs.send(About("", None, None, {}))
    client = EngineClient(ours, max_open=8, share=2)
    client.check_room(8)
    with pytest.raises(ValueError, match="9 answers .* 8 may be"):
        client.check_room(9)
    client.answers = {0: None}
    client.check_room(1)
    with pytest.raises(Busy, match="1 requests are open, and 2 may be"):
        client.check_room(2)

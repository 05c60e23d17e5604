"""A server before an engine, in this process or by the command line, and callers by hand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

import nanovllm
from nanovllm.serve.app import make_app
from nanovllm.serve.client import EngineClient
from nanovllm.serve.engine_process import in_thread
from nanovllm.serve.settings import ServeConfig
from nanovllm.serve.start import settings_of

PATIENCE_S = 60


def until(holds: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until something holds; an AssertionError says what did not."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {patience_s:g} s: {what}"
        time.sleep(0.01)


def parsed(text: str | bytes) -> Any:
    """JSON as its definition has it: NaN and infinities are none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Served:
    """An engine of this process, and a server before it on a free port."""

    def __init__(self, llm: Any, **options: Any):
        self.llm, self.config = llm, ServeConfig(port=0, **options)
        before = set(threading.enumerate())
        self.client = EngineClient(in_thread(llm), self.config.max_open)
        (self.engine,) = set(threading.enumerate()) - before
        app = make_app(self.client, self.config)
        self.server = uvicorn.Server(uvicorn.Config(app, **settings_of(self.config)))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started, "the server listens")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Ask for something and wait for all of it."""
        return self.http.post(path, json=body, **options)

    def is_idle(self) -> bool:
        """Does nobody wait, and is every block free?"""
        scheduler = self.llm.scheduler
        num_free = len(scheduler.block_manager.free_blocks)
        return (
            not self.client.answers and not self.llm.requests and num_free == scheduler.num_blocks
        )

    def settle(self) -> None:
        """Wait until the engine holds nothing any more."""
        until(self.is_idle, "no request, and every block free")

    def close(self) -> None:
        """End the server, and let go of the engine."""
        self.http.close()
        self.server.should_exit = True
        for thread in (self.thread, self.engine):
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), thread.name


@contextmanager
def served(llm: Any, **options: Any) -> Iterator[Served]:
    """`Served`, for a while."""
    server = Served(llm, **options)
    try:
        yield server
    finally:
        server.close()


def raw(port: int, data: bytes, patience_s: float = 10, close: bool = False) -> bytes:
    """What a server says to these bytes, until it is silent for a while or hangs up.

    close: end our half of the connection behind them.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as connection:
        found = b""
        try:
            connection.sendall(data)
            if close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except OSError:
            pass  # it has hung up, or says no more
        return found


def request_bytes(path: str, body: Any, method: str = "POST", headers: str = "") -> bytes:
    """A request as it goes over the wire, of a caller that hangs up after the reply."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + content


async def events(port: int, path: str, body: dict) -> list[dict]:
    """A stream's events, read by hand; [DONE] must come last and is left out."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, {**body, "stream": True}))
        told = await reader.read()
    finally:
        writer.close()
    head, _, rest = told.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], told[:500]
    chunks = []  # the transfer's, which need not be those of the API
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    lines = [line for line in b"".join(chunks).decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [parsed(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(told: list[dict], index: int = 0) -> str:
    """The text of one answer of a completion's events."""
    choices = [choice for event in told for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] for choice in choices)


class Command:
    """`nanovllm serve` in processes of their own."""

    def __init__(self, *options: str):
        package = str(Path(nanovllm.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "nanovllm", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores the signal, and so would this.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.said: list[str] = []
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr))
        self.reader.start()

    def ready(self) -> int:
        """Wait until it listens; its port."""
        until(lambda: self.said or self.process.poll() is not None, "it says where", 120)
        assert "serving at http://" in self.said[0], self.said
        return int(self.said[0].rpartition(":")[2])

    def children(self) -> list[int]:
        """The processes that it has started."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(name) for name in path.read_text().split()]

    def engine(self) -> int:
        """The engine's process: of its children the one that is no tracker of resources."""

        def is_engine(pid: int) -> bool:
            return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()

        (pid,) = filter(is_engine, self.children())
        return pid

    def end(self, patience_s: float = PATIENCE_S) -> tuple[int, str]:
        """Wait for its end: the exit status, and all that it has said."""
        status = self.process.wait(patience_s)
        self.reader.join(patience_s)
        return status, "".join(self.said)

    def kill(self) -> None:
        """Whatever is left of it, at once."""
        if self.process.poll() is None:
            self.process.kill()
        self.end()


def is_running(pid: int) -> bool:
    """Is a process there, and no mere entry of one that has ended?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

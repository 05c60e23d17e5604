"""`nanovllm serve`: an engine's process, and processes before it that speak HTTP."""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn

from nanovllm.serve.app import make_app
from nanovllm.serve.client import ENDED, EngineClient
from nanovllm.serve.engine_process import CONTEXT, deaf, in_process
from nanovllm.serve.guards import LOCAL_HOSTS
from nanovllm.serve.settings import ServeConfig

SWITCH_S = 0.001  # how long a thread may keep the interpreter, once another wants it


def serve(options: dict[str, Any], config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; what runs then is brought to its end, or to a second signal.

    options: of `LLM`. ValueError where they don't fit; RuntimeError where a process is lost.
    """
    if config.api_key is None and (key := os.environ.get("NANOVLLM_API_KEY")):
        config = replace(config, api_key=key)
    if config.api_key is None and config.host not in LOCAL_HOSTS:
        raise ValueError(f"host={config.host!r} lets others in: give an api_key that they send")
    doors, others = open_doors(config), list[BaseProcess]()
    ready, tell_ready = CONTEXT.Pipe(duplex=False)
    with ExitStack() as at_the_end:
        with deaf():
            pipes, engine = in_process(options, len(doors))
            at_the_end.callback(end_all, pipes, others, engine)
            for pipe, door in zip(pipes[1:], doors[1:], strict=True):
                beside = CONTEXT.Process(target=serve_beside, args=(pipe, config, door, tell_ready))
                beside.start()
                others.append(beside)
                pipe.close()  # it is the other's now
                door.close()
        server = make_server(pipes[0], config, ready)
        server.others = others
        server.run(sockets=doors[:1])
        if server.client.is_lost:
            raise RuntimeError(ENDED)
        if server.has_lost_one:
            raise RuntimeError("a process that speaks HTTP has ended")


def end_all(pipes: list[Connection], others: list[BaseProcess], engine: BaseProcess) -> None:
    """Close what is ours of the pipes; then end each process, with ten seconds' patience."""
    for pipe in pipes:
        pipe.close()
    for process in others:
        process.terminate()  # one that still waits for the engine
    for process in (*others, engine):
        process.join(10)
        process.kill()


def open_doors(config: ServeConfig) -> list[socket.socket]:
    """A socket for each process that is to speak HTTP; RuntimeError without the address."""
    try:
        found = socket.getaddrinfo(config.host.strip("[]"), config.port, type=STREAM)
        family, *_, place = min(found, key=lambda address: address[0] != socket.AF_INET)
        first = bound(family, place, False)
        if config.num_http_processes == 1:
            return [first]
        place = first.getsockname()
        first.close()
        return [bound(family, place, True) for _ in range(config.num_http_processes)]
    except OSError as error:
        raise RuntimeError(f"can't listen at {config.host}:{config.port}: {error}") from error


STREAM = socket.SOCK_STREAM


def bound(family: int, place: Any, is_shared: bool) -> socket.socket:
    """A socket that listens; others of the same user may share its address, if it `is_shared`."""
    door = socket.socket(family, STREAM)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    door.bind(place)
    door.listen(2048)  # from now on the address is ours, though nobody answers before the engine is
    return door


def serve_beside(
    pipe: Connection, config: ServeConfig, door: socket.socket, ready: Connection
) -> None:
    """The life of a further process that speaks HTTP; it ends with the one that has started it."""
    try:
        server = make_server(pipe, config, ready)
    except Exception:
        return  # there is no engine, as the first process says
    server.run(sockets=[door])


def make_server(pipe: Connection, config: ServeConfig, ready: Connection) -> "Listening":
    """A server before the engine at a pipe; an error of the engine where it can't be built."""
    sys.setswitchinterval(SWITCH_S)  # so that the thread that sends does not wait for its turn
    client = EngineClient(pipe, config.max_open, -(-config.max_open // config.num_http_processes))
    server = Listening(uvicorn.Config(make_app(client, config), **settings_of(config)))
    server.client, server.ready = client, ready
    client.on_loss = lambda: setattr(server, "should_exit", True)
    return server


def settings_of(config: ServeConfig) -> dict[str, Any]:
    """How uvicorn is to listen. Lines of requests are not logged: they may hold what is private."""
    # Connections above this number are told to come later.
    where = {"host": config.host, "port": config.port, "limit_concurrency": config.max_open + 64}
    return {**where, "access_log": False, "log_level": "warning", "server_header": False}


END = signal.SIGUSR1  # what the first process tells the others by: no terminal sends it


class Listening(uvicorn.Server):
    """A server that says where it listens, and ends together with those beside it."""

    client: EngineClient
    ready: Connection  # through it the others tell the first that they listen
    others: Sequence[BaseProcess] = ()  # that this one has started
    has_lost_one = False

    async def startup(self, sockets: Any = None) -> None:
        loop, parent = asyncio.get_running_loop(), multiprocessing.parent_process()
        for process in self.others if parent is None else [parent]:
            loop.add_reader(process.sentinel, self.lose, process)
        for _ in self.others:
            while not self.ready.poll() and not self.should_exit:
                await asyncio.sleep(0.01)
            if not self.should_exit:
                self.ready.recv_bytes()
        await super().startup(sockets)
        if parent is not None:
            loop.add_signal_handler(END, self.end)
            self.ready.send_bytes(b"it listens")
        elif not self.should_exit:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"nanovllm: serving at http://{host}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        while any(process.is_alive() for process in self.others) and not self.force_exit:
            await asyncio.sleep(0.02)  # those inside may finish, beside as here

    def lose(self, process: Any) -> None:
        """Another process has ended: the one that has started this one, or one beside it."""
        asyncio.get_running_loop().remove_reader(process.sentinel)
        is_last = process is multiprocessing.parent_process()  # who could say so a second time
        if is_last or not self.should_exit:
            self.has_lost_one = True
            self.end(is_last)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal has come, to this process or to its whole group: the first one decides."""
        if multiprocessing.parent_process() is None:
            self.end()

    def end(self, at_once: bool = False) -> None:
        """Let those inside finish, and take no others; the second time, wait for nothing."""
        for process in self.others:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, END)
        self.force_exit = self.should_exit or at_once
        logging.getLogger("uvicorn.error").disabled = self.force_exit  # not each that is cut off
        self.should_exit = True

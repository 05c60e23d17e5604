"""`nanovllm serve`: an engine's process, and a server before it."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn

from nanovllm.serve.app import make_app
from nanovllm.serve.client import EngineClient
from nanovllm.serve.engine_process import in_process
from nanovllm.serve.guards import LOCAL_HOSTS
from nanovllm.serve.settings import ServeConfig

SWITCH_S = 0.001  # how long a thread may keep the interpreter, once another wants it


def serve(options: dict[str, Any], config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; what runs then is brought to its end, or to a second signal.

    options: of `LLM`. ValueError where they don't fit; RuntimeError where the engine is lost.
    """
    key = os.environ.get("NANOVLLM_API_KEY")
    if config.api_key is None and key:
        config = replace(config, api_key=key)
    if config.api_key is None and config.host not in LOCAL_HOSTS:
        raise ValueError(
            f"host={config.host!r} lets others in: give an api_key that they must send"
        )
    sys.setswitchinterval(SWITCH_S)
    pipe, process = in_process(options)
    try:
        client = EngineClient(pipe, config.max_open)
        server = Listening(uvicorn.Config(make_app(client, config), **settings_of(config)))
        client.on_loss = lambda: setattr(server, "should_exit", True)
        with signals_end_it():
            server.run()
        if not client.is_alive and not client.is_closing:
            raise RuntimeError(client.load.failure)
    finally:
        pipe.close()  # the engine ends, if nobody has told it to
        process.join(10)
        process.kill()


def settings_of(config: ServeConfig) -> dict[str, Any]:
    """How uvicorn is to listen. Lines of requests are not logged: they may hold what is private."""
    most = config.max_open + 64  # connections; those above it are told to come later
    where = {"host": config.host, "port": config.port, "limit_concurrency": most}
    return {**where, "access_log": False, "log_level": "warning", "server_header": False}


class Listening(uvicorn.Server):
    """A server that says where it listens."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for door in (door for server in self.servers for door in server.sockets):
            host, port = door.getsockname()[:2]
            print(f"nanovllm: serving at http://{host}:{port}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal has come; after a second one, of whatever kind, nothing is waited for."""
        self.force_exit = self.should_exit
        logging.getLogger("uvicorn.error").disabled = self.force_exit  # not each that is cut off
        super().handle_exit(sig, frame)


@contextmanager
def signals_end_it() -> Iterator[None]:
    """Let a signal that has ended the server be done with, once it has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

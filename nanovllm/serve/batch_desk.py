"""Who answers the rows of a batch, and how many at once."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from itertools import islice
from typing import Any

from nanovllm.config import Config
from nanovllm.serve.app import make_app
from nanovllm.serve.batch_file import LONGEST_LINE
from nanovllm.serve.batch_rows import Reply, Row, reply_of
from nanovllm.serve.calls import error_body
from nanovllm.serve.client import EngineClient
from nanovllm.serve.settings import ServeConfig

ATTEMPTS = 3  # with a row whose step fails

Message = MutableMapping[str, Any]


class Desk:
    """Answers rows by the server's own application, with no socket between."""

    def __init__(self, client: EngineClient, model: str | None):
        config = ServeConfig(served_model_name=model, max_body_bytes=LONGEST_LINE)
        self.client, self.app = client, make_app(client, config)

    async def answer(self, rows: list[Row]) -> list[Reply]:
        """The lines that answer some rows; RuntimeError where the engine has ended."""
        return await asyncio.gather(*map(self.answer_one, rows))

    async def answer_one(self, row: Row) -> Reply:
        """The line that answers a row."""
        for _ in range(ATTEMPTS):
            try:
                status, body = await self.post(row.url, row.body)
            except Exception as error:  # of one request, and of no other
                status, body = 500, error_body(repr(error), "server_error")
            if not self.client.is_alive:
                raise RuntimeError("the engine has ended by itself")
            if status < 500:
                break
        return reply_of(row, status, body)

    async def post(self, url: str, body: bytes) -> tuple[int, Any]:
        """The status and the body that the server replies with."""
        asked: list[Message] = [{"type": "http.request", "body": body}]
        told: list[Message] = []

        async def receive() -> Message:
            return asked.pop() if asked else await asyncio.Future()  # nobody hangs up

        async def send(message: Message) -> None:
            told.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        headers.append((b"content-length", str(len(body)).encode()))
        scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"}
        scope |= {"method": "POST", "scheme": "http", "path": url, "raw_path": url.encode()}
        scope |= {"query_string": b"", "root_path": "", "headers": headers}
        await self.app(scope, receive, send)
        text = b"".join(message.get("body", b"") for message in told)
        return told[0]["status"], json.loads(text)


AnswerRows = Callable[[list[Row]], Awaitable[list[Reply]]]
Note = Callable[[Row, Reply], None]


def width_of(options: dict[str, Any]) -> int:
    """How many rows one engine has under way: as many as may run, and as many that wait."""
    return 2 * Config.from_options(**options).max_num_seqs


async def drain(
    rows: Iterator[Row], note: Note, answer: AnswerRows, num_readers: int, size: int
) -> None:
    """Answer all rows, `size` of them in a call, by so many calls at once."""

    async def read() -> None:
        while chunk := list(islice(rows, size)):
            for row, reply in zip(chunk, await answer(chunk), strict=True):
                note(row, reply)

    await asyncio.gather(*(read() for _ in range(num_readers)))

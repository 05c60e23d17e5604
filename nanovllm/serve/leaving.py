"""Callers who leave before they have got what they asked for."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse


async def gone(request: Request) -> None:
    """Return when the caller has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine) -> Any:
    """What the work comes to; where the caller hangs up before, it is cancelled, and None."""
    job, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({job, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await job if job.done() else None
    finally:
        job.cancel()
        leaving.cancel()


class EventStream(StreamingResponse):
    """Server-sent events, each sent as it comes; `leave` is called however it ends."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]):
        super().__init__(
            (f"data: {event}\n\n" async for event in events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()

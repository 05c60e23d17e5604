"""What stands before the routes: who may ask, and how much. And how a refusal is told."""

import hmac
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response

from nanovllm.serve.calls import error_body
from nanovllm.serve.settings import ServeConfig

OPEN_PATHS = "/", "/health"  # what needs no key
LOCAL_HOSTS = "127.0.0.1", "localhost", "::1", "[::1]"
PORT = re.compile(r":\d*$")


def reply_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A reply in ASCII: half a character that a caller has sent can be told back, too."""
    text = json.dumps(content)
    return Response(text, status, headers, media_type="application/json")


def refusal(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> Response:
    """An error as the API tells it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status == 429 else kind
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else headers
    return reply_json(error_body(message, kind, param, code), status, headers)


class Guard:
    """Lets a request through that brings the key, and whose body is not too long."""

    def __init__(self, app: Callable, config: ServeConfig):
        self.app, self.config = app, config
        self.key = None if config.api_key is None else f"Bearer {config.api_key}".encode()
        self.is_local = self.key is None and config.host in LOCAL_HOSTS

    def refuse(self, scope: dict) -> Response | None:
        """How to refuse a request, by its headers; None where it may pass."""
        headers = dict(scope["headers"])
        host = PORT.sub("", headers.get(b"host", b"").decode("latin-1"))
        if self.is_local and host not in LOCAL_HOSTS:
            return refusal(403, "without a key, only this machine's own names are served", "host")
        if self.key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        if hmac.compare_digest(headers.get(b"authorization", b""), self.key):
            return None
        return refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (reply := self.refuse(scope)) is not None:
            return await reply(scope, receive, send)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None  # the caller has left
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.config.max_body_bytes:
                limit = f"a body may have {self.config.max_body_bytes:,} bytes"
                return await refusal(413, limit, code="body_too_large")(scope, receive, send)
        whole = {"type": "http.request", "body": bytes(body), "more_body": False}
        await self.app(scope, once(whole, receive), send)


def once(first: dict, then: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
    """Receive a message that is here already, and then what comes."""
    messages = [first]

    async def receive() -> dict:
        return messages.pop() if messages else await then()

    return receive

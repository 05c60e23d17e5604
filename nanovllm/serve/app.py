"""The application: the routes, what stands before them, and how errors are told."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from nanovllm.engine.guide import prepare_guides
from nanovllm.serve.client import Busy, EngineClient
from nanovllm.serve.guards import Guard, refusal
from nanovllm.serve.protocol import ChatRequest, CompletionRequest
from nanovllm.serve.server import NoSuchModel, Server
from nanovllm.serve.settings import ServeConfig


def make_app(client: EngineClient, config: ServeConfig) -> FastAPI:
    """The application that serves an engine; it begins to talk with it at its start."""
    prepare_guides(client.about.tokenizer, client.about.limits.vocab_size)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client.start()
        yield
        client.close()

    app = FastAPI(title="nanovllm", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_routes(app, client, config)
    for kind, tell in TELLERS.items():
        app.add_exception_handler(kind, tell)
    app.add_middleware(Guard, config=config)
    if config.allowed_origins:
        origins, every = list(config.allowed_origins), ["*"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=every, allow_headers=every
        )
    return app


def add_routes(app: FastAPI, client: EngineClient, config: ServeConfig) -> None:
    """What can be asked for, and who answers."""
    server = Server(client, config.name_of(client.about.model))
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", server.complete, methods=["POST"], response_model=None)
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/detokenize", server.detokenize, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", server.models, response_model=None)
    app.add_api_route("/v1/models/{name:path}", server.one_model, response_model=None)
    app.add_api_route("/health", server.health, response_model=None)
    app.add_api_route("/metrics", server.metrics, response_model=None)
    app.add_api_route("/", server.page, response_model=None)


def tell_misfit(request: Request, error: Any) -> Response:
    """A body that is no JSON, or not of the shape that is asked for."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:] if part in NAMES or isinstance(part, int)]
    param = ".".join(where) or None
    message = f"{param or 'the body'}: {first['msg']}"
    if first["type"] == "extra_forbidden":
        param = str(first["loc"][-1])
        message = f"{param} is not known here"
    return refusal(400, message, param)


def tell_bad_value(request: Request, error: Any) -> Response:
    """What the engine refuses, in its words; as a rule they begin with the option's name."""
    message, code = str(error), None
    if "exceed max_model_len=" in message:  # clients know it by the code, or by OpenAI's words
        code, longest = "context_length_exceeded", message.rpartition("=")[2]
        message += f": this model's maximum context length is {longest} tokens"
    name = message.partition(" ")[0].partition("=")[0].rstrip(":")
    return refusal(400, message, name if name in NAMES else None, code)


NAMES = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
TELLERS: dict[type[Exception], Any] = {
    RequestValidationError: tell_misfit,
    ValueError: tell_bad_value,
    NoSuchModel: lambda _, error: refusal(404, str(error), "model", "model_not_found"),
    Busy: lambda _, error: refusal(429, str(error), code="too_many_requests"),
    HTTPException: lambda _, error: refusal(error.status_code, str(error.detail)),
    RuntimeError: lambda _, error: refusal(500, str(error)),
    Exception: lambda _, error: refusal(500, "the server has failed; its log says how"),
}

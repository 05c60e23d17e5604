"""The routes: OpenAI's API before one engine."""

import asyncio
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.responses import Response

from nanovllm.engine.sequence import Sequence
from nanovllm.serve.asked import chat_params, completion_params, prompts_of, sequences_of
from nanovllm.serve.calls import Call
from nanovllm.serve.chat_call import ChatCall
from nanovllm.serve.client import EngineClient
from nanovllm.serve.completion_call import CompletionCall
from nanovllm.serve.guards import refusal, reply_json
from nanovllm.serve.leaving import EventStream, unless_gone
from nanovllm.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from nanovllm.utils.chat import check_chat_template, encode_chat
from nanovllm.utils.errors import as_value_error
from nanovllm.utils.tokenizer import check_token_ids, encode

Built = Callable[[], list[Sequence]]
LONG = 10_000  # bytes of a body; to change threads takes as long as to read one that is shorter


class NoSuchModel(Exception):
    """A model is asked for that is not served."""


class Server:
    """Answers calls of the API by what an engine says."""

    def __init__(self, client: EngineClient, model: str):
        self.client, self.model, self.started = client, model, int(time.time())

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Texts that go on where the prompts end."""

        def build() -> list[Sequence]:
            params = completion_params(body, self.client.about)
            return list(sequences_of(prompts, params, body.n or 1, self.client.about))

        if body.echo and body.stream and body.logprobs is not None:
            raise ValueError("echo with logprobs is not streamed: they come at the end")
        prompts = prompts_of(body)
        self.client.check_room(len(prompts) * (body.n or 1))
        seqs = await self.built(request, body, build)
        answers = self.client.submit(seqs, whole=not body.stream)
        call = CompletionCall(self.client, answers, self.model, body)
        return await self.answer(request, call, bool(body.stream))

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """What an assistant says next in a conversation."""

        def build() -> list[Sequence]:
            params = chat_params(body, self.client.about)
            prompt = encode_said(self.client.about.tokenizer, body)
            return list(sequences_of([prompt], params, body.n or 1, self.client.about))

        self.client.check_room(body.n or 1)
        seqs = await self.built(request, body, build)
        answers = self.client.submit(seqs, whole=not body.stream)
        in_thought = ends_in_thought(self.client.about.tokenizer, answers[0].prompt)
        call = ChatCall(self.client, answers, self.model, body, in_thought)
        return await self.answer(request, call, bool(body.stream))

    async def built(self, request: Request, body: Sampling, build: Built) -> list[Sequence]:
        """The sequences of a call; in another thread where a long text or a grammar takes time."""
        self.check_model(body.model)
        is_short = int(request.headers.get("content-length", LONG)) < LONG
        form, choice = getattr(body, "response_format", None), getattr(body, "tool_choice", None)
        has_grammar = form is not None or choice not in (None, "auto", "none")
        return build() if is_short and not has_grammar else await asyncio.to_thread(build)

    async def answer(self, request: Request, call: Call, stream: bool) -> Response:
        """The reply to a call, whole or in pieces; a caller who leaves is not waited for."""
        if stream:
            return EventStream(call.events(), call.leave)
        try:
            reply = await unless_gone(request, call.reply())
        finally:
            call.leave()
        return Response(status_code=499) if reply is None else reply_json(reply)

    def check_model(self, name: str | None) -> None:
        """NoSuchModel where another model is meant."""
        if name not in (None, self.model, self.client.about.model):
            raise NoSuchModel(f"the model {name!r} is not served here: {self.model!r} is")

    def card(self) -> dict[str, Any]:
        """What there is to say of the model."""
        longest = self.client.about.limits.longest_sequence()
        card = {"id": self.model, "object": "model", "created": self.started}
        return {**card, "owned_by": "nanovllm", "max_model_len": longest}

    async def models(self) -> Response:
        """The list of the one model that is served."""
        return reply_json({"object": "list", "data": [self.card()]})

    async def one_model(self, name: str) -> Response:
        """The one that is served; NoSuchModel for another name."""
        self.check_model(name)
        return reply_json(self.card())

    async def health(self) -> Response:
        """200 while the engine can step; 503 where its steps fail, or it has ended."""
        try:
            failure = (await self.client.report()).failure
        except RuntimeError as error:
            failure = str(error)
        return reply_json({"status": "ok"}) if failure is None else refusal(503, failure)

    async def metrics(self) -> Response:
        """What the engine has counted, in Prometheus's text format."""
        text = (await self.client.report()).metrics
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """The token ids of a text, or of a conversation."""
        if (body.prompt is None) == (body.messages is None):
            raise ValueError("give prompt or messages, and not both")
        tokenizer = self.client.about.tokenizer
        if body.prompt is not None:
            tokens = await asyncio.to_thread(encode, tokenizer, body.prompt)
        else:
            tokens = await asyncio.to_thread(encode_said, tokenizer, body)
        longest = self.client.about.limits.longest_sequence()
        return reply_json({"tokens": tokens, "count": len(tokens), "max_model_len": longest})

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        about = self.client.about
        check_token_ids(body.tokens, about.limits.vocab_size)
        text = about.tokenizer.backend_tokenizer.decode(body.tokens, skip_special_tokens=False)
        return reply_json({"prompt": text})

    async def page(self) -> Response:
        """A small chat, to try the model by hand."""
        page = Path(__file__).with_name("chat.html").read_bytes()
        return Response(page, headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")


PAGE_HEADERS = {  # it is shown in no other page, and as the file is now
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def encode_said(tokenizer: Any, body: ChatRequest | TokenizeRequest) -> list[int]:
    """The token ids of a conversation, as the checkpoint's chat template writes it.

    ValueError where the body brings a template, which is a program, or what else is not for it
    to say. An assistant that has called tools need not have said anything.
    """
    check_chat_template(tokenizer)
    options = dict(body.chat_template_kwargs or {})
    for name in inspect.signature(tokenizer.apply_chat_template).parameters.keys() & options:
        raise ValueError(f"chat_template_kwargs can't hold {name}: it is no option of a template")
    if isinstance(body, ChatRequest) and body.tools and body.tool_choice != "none":
        options["tools"] = body.tools
    messages = [
        {**said, "content": said.get("content") or ""} if said.get("tool_calls") else said
        for said in body.messages or []
    ]
    with as_value_error("messages"):
        return encode_chat(tokenizer, messages, options)


def ends_in_thought(tokenizer: Any, prompt: list[int]) -> bool:
    """Does the prompt end where the model is to think? Some chat templates begin the thought."""
    end = tokenizer.backend_tokenizer.decode(prompt[-8:], skip_special_tokens=False)
    return end.rstrip().endswith("<think>")

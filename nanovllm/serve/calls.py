"""A call of the API, from its sequences to its reply: in pieces, or whole."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from nanovllm.engine.outputs import StreamPiece
from nanovllm.serve.client import Answer, EngineClient, pieces
from nanovllm.serve.protocol import Sampling
from nanovllm.serve.replies import usage_of

Choice = dict[str, Any]


class Call:
    """One call: its answers, and the words that they are told in. Subclasses know the words."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, client: EngineClient, answers: list[Answer], model: str, body: Sampling):
        self.client, self.answers, self.n = client, answers, body.n or 1
        self.tells_usage = body.stream_options is not None and body.stream_options.include_usage
        self.tokenizer = client.about.tokenizer
        self.head: dict[str, Any] = {"id": f"{self.prefix}-{uuid.uuid4().hex}"}
        self.head |= {"object": self.chunk_kind, "created": int(time.time()), "model": model}
        self.counts = [0] * len(answers)  # tokens, by answer

    def first(self, index: int) -> list[Choice]:
        """What a stream says of an answer before anything has come."""
        return []

    def told(self, index: int, piece: StreamPiece) -> list[Choice]:
        """What a stream says of a piece."""
        raise NotImplementedError

    def whole(self, index: int, joined: StreamPiece) -> Choice:
        """What a reply says of an answer, all of whose pieces were joined."""
        raise NotImplementedError

    def leave(self) -> None:
        """Nobody waits for this call any more."""
        self.client.leave(self.answers)

    def usage(self) -> dict[str, Any]:
        """How many tokens the call took; a prompt counts once, however many answers it has.

        What the prefix cache had of a prompt before the call is what it spared the first answer.
        """
        firsts = self.answers[:: self.n]
        ends = [answer.last.metrics for answer in firsts if answer.last is not None]
        return usage_of(sum(len(answer.prompt) for answer in firsts), sum(self.counts), ends)

    async def events(self) -> AsyncIterator[str]:
        """The stream's events, as JSON: chunks, and at the end the usage where it is asked for."""
        head = self.head | ({"usage": None} if self.tells_usage else {})
        try:
            for index in range(len(self.answers)):
                for choice in self.first(index):
                    yield json.dumps({**head, "choices": [choice]})
            async for index, piece in pieces(self.answers):
                self.counts[index] += len(piece["token_ids"])
                for choice in self.told(index, piece):
                    yield json.dumps({**head, "choices": [choice]})
            if self.tells_usage:
                yield json.dumps({**head, "choices": [], "usage": self.usage()})
        except RuntimeError as error:  # the reply has begun: its status can't tell any more
            yield json.dumps(error_body(str(error), "server_error"))
        yield "[DONE]"

    async def reply(self) -> dict[str, Any]:
        """The whole reply; RuntimeError where an answer fails."""
        joined = [
            StreamPiece(text="", token_ids=[], finish_reason=None, logprobs=None)
            for _ in self.answers
        ]
        async for index, piece in pieces(self.answers):
            whole = joined[index]
            whole["text"] += piece["text"]
            whole["token_ids"] += piece["token_ids"]
            whole["finish_reason"] = piece["finish_reason"]
            if piece["logprobs"] is not None:
                whole["logprobs"] = (whole["logprobs"] or []) + piece["logprobs"]
        self.counts = [len(whole["token_ids"]) for whole in joined]
        choices = [self.whole(index, whole) for index, whole in enumerate(joined)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    """An error in the API's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

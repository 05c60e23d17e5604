"""/v1/chat/completions."""

import uuid
from typing import Any

from nanovllm.engine.outputs import StreamPiece
from nanovllm.serve.calls import Call, Choice
from nanovllm.serve.client import Answer, EngineClient
from nanovllm.serve.parts import Part, Splitter
from nanovllm.serve.protocol import ChatRequest
from nanovllm.serve.replies import chat_logprobs


class ChatCall(Call):
    """What an assistant says."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        client: EngineClient,
        answers: list[Answer],
        model: str,
        body: ChatRequest,
        in_thought: bool,
    ):
        super().__init__(client, answers, model, body)
        self.body = body
        tools = bool(body.tools) and body.tool_choice != "none"
        self.splitters = [Splitter(in_thought, tools) for _ in answers]
        self.num_calls = [0] * len(answers)  # of tools, told so far

    def first(self, index: int) -> list[Choice]:
        return [self.choice(index, {"role": "assistant", "content": ""}, None, None)]

    def choice(self, index: int, delta: dict, told: Any, reason: str | None) -> Choice:
        """One answer's part of a chunk."""
        logprobs = chat_logprobs(self.tokenizer, told, self.body.top_logprobs or 0)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def reason(self, index: int, reason: str | None) -> str | None:
        """Why an answer ended: a call of a tool is a reason of its own."""
        return "tool_calls" if reason == "stop" and self.num_calls[index] else reason

    def parts(self, index: int, piece: StreamPiece) -> list[Part]:
        """The parts that have become certain by a piece."""
        splitter = self.splitters[index]
        parts = list(splitter.feed(piece["text"]))
        return parts + (list(splitter.finish()) if piece["finish_reason"] is not None else [])

    def told(self, index: int, piece: StreamPiece) -> list[Choice]:
        told, reason, choices = piece["logprobs"], piece["finish_reason"], []
        for kind, text in self.parts(index, piece):
            self.num_calls[index] += kind == "call"
            delta = delta_of(kind, text, self.num_calls[index] - 1)
            choices.append(self.choice(index, delta, None, None))
        if told and not choices:  # tokens whose text is not certain yet
            choices = [self.choice(index, {}, None, None)]
        if told:
            choices[0] = self.choice(index, choices[0]["delta"], told, None)
        if reason is not None:
            choices.append(self.choice(index, {}, None, self.reason(index, reason)))
        return choices

    def whole(self, index: int, joined: StreamPiece) -> Choice:
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        for kind, text in self.parts(index, joined):
            if kind in ("content", "reasoning_content"):
                message[kind] = (message.get(kind) or "") + text
            elif kind == "call":
                (call,) = delta_of(kind, text, 0)["tool_calls"]
                del call["index"]
                message.setdefault("tool_calls", []).append(call)
                self.num_calls[index] += 1
            else:
                message["tool_calls"][-1]["function"]["arguments"] += text
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        logprobs = chat_logprobs(self.tokenizer, joined["logprobs"], self.body.top_logprobs or 0)
        reason = self.reason(index, joined["finish_reason"])
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def delta_of(kind: str, text: str, number: int) -> dict[str, Any]:
    """A part as a stream tells it; `number` counts the calls of tools."""
    if kind in ("content", "reasoning_content"):
        return {kind: text}
    if kind == "arguments":
        return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
    function, name = {"name": text, "arguments": ""}, f"call_{uuid.uuid4().hex[:24]}"
    call = {"index": number, "id": name, "type": "function", "function": function}
    return {"tool_calls": [call]}

"""/v1/completions."""

from typing import Any

from nanovllm.engine.outputs import StreamPiece
from nanovllm.serve.calls import Call, Choice
from nanovllm.serve.client import Answer, EngineClient
from nanovllm.serve.protocol import CompletionRequest
from nanovllm.serve.replies import completion_logprobs


class CompletionCall(Call):
    """Texts that go on."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, client: EngineClient, answers: list[Answer], model: str, body: CompletionRequest
    ):
        super().__init__(client, answers, model, body)
        self.body, self.lengths = body, [0] * len(answers)  # of the texts, in characters

    def choice(self, index: int, text: str, told: Any, reason: str | None) -> Choice:
        """One answer's part of a chunk or of a reply."""
        logprobs = completion_logprobs(
            self.tokenizer, told, self.body.logprobs or 0, self.lengths[index]
        )
        self.lengths[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def told(self, index: int, piece: StreamPiece) -> list[Choice]:
        reason, told = piece["finish_reason"], piece["logprobs"]
        if self.body.max_tokens == 0:  # one token was needed, and is not wanted
            return [] if reason is None else [self.choice(index, "", None, "length")]
        return [self.choice(index, piece["text"], told, reason)]

    def echoed(self, answer: Answer) -> str:
        """The prompt's text, as its tokens say it."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.backend_tokenizer.decode(answer.prompt, skip_special_tokens=False)

    def first(self, index: int) -> list[Choice]:
        if not self.body.echo:
            return []
        return [self.choice(index, self.echoed(self.answers[index]), None, None)]

    def whole(self, index: int, joined: StreamPiece) -> Choice:
        answer, text, told = self.answers[index], joined["text"], joined["logprobs"]
        reason = joined["finish_reason"]
        if self.body.max_tokens == 0:
            text, told, reason, self.counts[index] = "", told and [], "length", 0
        if not self.body.echo:
            return self.choice(index, text, told, reason)
        if told is not None and answer.last is not None:
            prompt = answer.last.prompt_logprobs or []
            prompt_told = [{answer.prompt[0]: None}, *filter(None, prompt)]
            return self.choice(index, self.echoed(answer) + text, prompt_told + told, reason)
        return self.choice(index, self.echoed(answer) + text, told, reason)

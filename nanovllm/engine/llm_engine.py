"""The engine: requests in, a token a step, results out."""

import itertools
import numbers
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from time import perf_counter
from typing import Any, TypedDict

import numpy as np

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline import Pipeline
from nanovllm.engine.progress import Progress
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.turns import Turns
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.errors import as_value_error
from nanovllm.utils.loader import find_checkpoint
from nanovllm.utils.options import as_python
from nanovllm.utils.tokenizer import load_tokenizer

Prompt = str | list[int]
Messages = list[dict[str, object]]  # role and content, and what else the chat template knows


class StreamPiece(TypedDict):
    """What is new of a request; `stream` yields one after the other."""

    text: str
    token_ids: list[int]
    finish_reason: str | None  # None but in the last piece


class RequestMetrics(TypedDict):
    """What became of one request; times in seconds, None where too few tokens came."""

    time_to_first_token: float | None  # since the request was added
    time_per_output_token: float | None  # the mean, of those after the first
    num_cached_tokens: int  # prompt tokens that the prefix cache saved
    num_preemptions: int


class RequestOutput(StreamPiece):
    """What `generate` returns for one prompt; also the last piece of a stream."""

    error: str | None  # what went wrong, where finish_reason is "error"
    metrics: RequestMetrics


class LLMEngine:
    """Owns the requests, and grows them one step at a time. Threads may share it."""

    def __init__(self, model: str | PathLike | None = None, **options):
        """`model` and `options` are the fields of `Config`; a misfit raises ValueError."""
        model = fspath(model) if isinstance(model, PathLike) else model
        self.config = Config.from_options(model=model, **options)
        folder = find_checkpoint(self.config.model)
        model_config = ModelConfig.from_folder(folder)
        self.tokenizer = load_tokenizer(folder)
        # An end-of-sequence token may stand in three places; the third is the tokenizer.
        self.model_config = model_config.with_eos(getattr(self.tokenizer, "eos_token_id", None))
        is_asked = "max_model_len" in options
        self.max_model_len = self.model_config.fit(self.config.max_model_len, is_asked)
        self.model_runner = ModelRunner(self.config, self.model_config, folder, self.max_model_len)
        self.seeds = random.Random(self.config.seed)
        self.seq_ids = itertools.count()
        eos_token_ids = self.model_config.eos_token_ids
        self.scheduler = Scheduler(self.config, self.num_blocks, eos_token_ids)
        self.pipeline = Pipeline()
        self.turns = Turns(on_error=self.fail_all)
        self.requests: dict[int, Sequence] = {}  # the unfinished ones, by their ids

    def step(self) -> list[Sequence]:
        """Run the model once; returns the sequences that gained a token, or ended.

        Where another thread is in a step, it waits for that one's end and returns nothing: the
        requests of all threads share the steps. Whatever is raised in a step, Ctrl-C included,
        the engine holds no request afterwards.
        """
        self.check_alive()
        with self.turns.turn() as is_mine:
            seqs = self.run_step() if is_mine else []
        self.forget_finished(seqs)
        return seqs

    def run_step(self) -> list[Sequence]:
        """Account for the oldest step in flight; before it waits for that, it launches the next."""
        self.check_alive()
        scheduler, pipeline = self.scheduler, self.pipeline
        while len(pipeline) < self.config.max_in_flight and (seqs := scheduler.schedule()):
            pipeline.push(seqs, self.model_runner.run(seqs))
        if not pipeline and not scheduler.is_finished():
            raise RuntimeError("no request can run, and none is on its way")
        grown = scheduler.postprocess(*pipeline.pop()) if pipeline else []
        if scheduler.is_finished():
            pipeline.forget()
        return grown

    @property
    def num_blocks(self) -> int:
        """Blocks in the cache."""
        return self.model_runner.num_blocks

    def forget_finished(self, seqs: list[Sequence]) -> None:
        """What is done is no request of the engine's any more."""
        for seq in seqs:
            if seq.is_finished:
                self.requests.pop(seq.seq_id, None)

    def is_finished(self) -> bool:
        """True when no request is left."""
        self.turns.settle()
        return not self.requests

    def make_sequence(self, prompt: Prompt, params: SamplingParams | None = None) -> Sequence:
        """A checked request that nothing has been done for yet; ValueError for a bad one."""
        self.check_alive()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be SamplingParams, got {params!r}")
        token_ids = self.encode(prompt)
        vocab_size = self.model_config.vocab_size
        for token_id in (*token_ids, *params.stop_token_ids):
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ValueError(f"token id {token_id!r} is outside the vocabulary of {vocab_size}")
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one token")
        self.check_length(len(token_ids), params.max_tokens)
        if params.max_tokens is None:
            params = replace(params, max_tokens=self.longest_sequence() - len(token_ids))
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the checkpoint has none")
        seq = Sequence(next(self.seq_ids), token_ids, params, params.seed)
        if params.stop:
            seq.detokenizer = Detokenizer(self.tokenizer, params.stop)
        return seq

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """ValueError for a request that can't be brought to its end, or can't begin."""
        num_tokens = num_prompt_tokens + (max_tokens or 1)
        asked = f"a prompt of {num_prompt_tokens} tokens and max_tokens={max_tokens} exceed"
        if num_tokens > self.max_model_len:
            raise ValueError(f"{asked} max_model_len={self.max_model_len}")
        size = self.config.kvcache_block_size
        if num_tokens > self.num_blocks * size:
            raise ValueError(f"{asked} the cache of {self.num_blocks} blocks of {size} tokens")

    def longest_sequence(self) -> int:
        """The most tokens, prompt and output together, that a request may come to."""
        return min(self.max_model_len, self.num_blocks * self.config.kvcache_block_size)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, in a list of its own."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the checkpoint has no tokenizer: give token ids, not text")
            with as_value_error("the prompt is no Unicode text"):
                prompt.encode()
            with as_value_error("the tokenizer can't encode the prompt"):
                return self.tokenizer.encode(prompt)
        if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
            return prompt.tolist()
        if not isinstance(prompt, list | tuple):
            raise ValueError(f"a prompt is text or a list of token ids, got {prompt!r}")
        if set(map(type, prompt)) <= {int}:  # as nearly always, and then it costs next to nothing
            return list(prompt)
        return [as_python(token_id) for token_id in prompt]

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a request and return its id; ValueError, and nothing queued, for a bad one."""
        return self.add(self.make_sequence(prompt, sampling_params)).seq_id

    def add(self, seq: Sequence) -> Sequence:
        """Queue a checked sequence."""
        self.check_alive()
        if seq.seed is None:  # drawn now, so that a request that was refused draws nothing
            seq.seed = self.seeds.getrandbits(62)
        seq.arrival_time = perf_counter()
        self.requests[seq.seq_id] = seq
        self.turns.ask(partial(self.enqueue, seq))
        return seq

    def enqueue(self, seq: Sequence) -> None:
        """Let a sequence wait for its first step."""
        self.scheduler.add(seq)

    def abort(self, seq_id: int) -> None:
        """Forget an unfinished request; ValueError for an id that is not in the engine.

        Where a step runs, it happens when that step has ended.
        """
        seq = self.requests.get(seq_id)
        if seq is None:
            raise ValueError(f"request {seq_id} is not in the engine")
        self.drop([seq])

    def drop(self, seqs: list[Sequence]) -> None:
        """Nobody waits for these any more: forget those that are not finished."""
        for seq in seqs:
            if self.requests.pop(seq.seq_id, None) is not None:
                self.turns.ask(partial(self.remove, seq))

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out of the queues."""
        if not seq.is_finished:
            self.scheduler.abort(seq.seq_id)

    def check_alive(self) -> None:
        """Raise a RuntimeError after `exit`."""
        if self.model_runner is None:
            raise RuntimeError("the engine has exited: make a new one")

    def reset(self) -> None:
        """Forget every request; where a step runs, when it has ended."""
        self.turns.ask(self.fail_all)

    def fail_all(self, error: BaseException | None = None) -> None:
        """Forget every request, whatever state `error` left it in; its caller will be told."""
        self.drop_all(error)
        self.pipeline.forget()
        self.forget_finished(list(self.requests.values()))

    def drop_all(self, error: BaseException | None) -> None:
        """Finish what is in the queues, and empty them: all blocks are free."""
        self.scheduler.reset(error)

    def reset_prefix_cache(self) -> None:
        """Forget what is kept of earlier requests, for example after the weights have changed."""
        self.turns.ask(lambda: self.scheduler.block_manager.reset_prefix_cache())

    def exit(self) -> None:
        """Give the model and its memory back, as soon as no step runs; twice does no harm."""
        self.turns.ask(self.close)
        while self.model_runner is not None and not self.turns.is_inside():
            with self.turns.turn():
                pass  # another thread's step has ended, or there was none

    def close(self) -> None:
        """Let go of the requests and of the model."""
        self.fail_all()
        self.model_runner = None

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        `prompts` is text, a list of token ids, or a list of these; `sampling_params` is one for
        all or a list of the same length. All are checked before any work: a bad one raises
        ValueError. Whatever is raised, Ctrl-C included, none of its requests stays in the engine.
        A request that fails by itself gets the finish_reason "error", and the others go on.
        """
        prompts = as_prompt_list(prompts)
        params = sampling_params
        if not isinstance(params, list | tuple):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(params)} sampling_params")
        seqs = [self.make_sequence(*request) for request in zip(prompts, params, strict=True)]
        try:
            for seq in seqs:
                self.add(seq)
            with Progress(seqs, enabled=use_tqdm) as progress:
                while not all(seq.is_finished for seq in seqs):
                    self.step()
                    progress.update()
            return [self.output(seq) for seq in seqs]
        finally:
            self.drop(seqs)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[StreamPiece]:
        """Complete one prompt and yield it in pieces, each holding what is new.

        The pieces' texts and token ids, joined, are what `generate` returns; the last piece is a
        `RequestOutput` and has a finish_reason. A consumer that stops early aborts the request.
        """
        return self.stream_sequence(self.make_sequence(prompt, sampling_params))

    def stream_sequence(self, seq: Sequence) -> Iterator[StreamPiece]:
        """Yield a checked sequence's pieces as they come."""
        seq.outbox = deque()
        if self.tokenizer is not None:
            seq.detokenizer = Detokenizer(self.tokenizer, seq.params.stop)
        self.add(seq)
        try:
            is_last = False
            while not is_last:
                if not seq.is_finished:  # else another caller's steps have finished it
                    self.step()
                is_last = seq.is_finished  # asked first: then nothing more comes behind the piece
                piece = self.take_piece(seq, is_last)
                if piece["token_ids"] or piece["text"] or is_last:
                    yield piece
        finally:
            self.drop([seq])

    def take_piece(self, seq: Sequence, is_last: bool) -> StreamPiece:
        """What has come since the last call."""
        token_ids = [seq.outbox.popleft() for _ in range(len(seq.outbox))]
        if is_last:
            piece = self.output(seq)  # its text is what has not been taken
            piece["token_ids"] = token_ids
            return piece
        text = seq.detokenizer.take_ready() if seq.detokenizer else ""
        return StreamPiece(text=text, token_ids=token_ids, finish_reason=None)

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list, through the checkpoint's chat template.

        `chat_template_kwargs` are handed to the template, as Qwen3's enable_thinking.
        """
        first = messages[0] if isinstance(messages, list | tuple) and messages else None
        conversations = messages if isinstance(first, list | tuple) else [messages]
        prompts = [self.apply_chat_template(c, chat_template_kwargs) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def apply_chat_template(
        self, messages: Messages, chat_template_kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """The token ids of a conversation, up to where the assistant's answer begins.

        Where the last message is the assistant's, the answer goes on where that ends.
        """
        self.check_chat_template()
        messages = check_messages(messages)
        is_begun = messages[-1]["role"] == "assistant"
        with as_value_error("the chat template does not take this conversation"):
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not is_begun,
                continue_final_message=is_begun,
                **({} if chat_template_kwargs is None else chat_template_kwargs),
            )
            return self.tokenizer.encode(text, add_special_tokens=False)

    def check_chat_template(self) -> None:
        """ValueError where there is none."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("the checkpoint has no chat template")

    def output(self, seq: Sequence) -> RequestOutput:
        """A finished sequence's result; its text ends before the stop string that ended it."""
        text = self.text_of(seq)
        return RequestOutput(
            text=text,
            token_ids=seq.completion_token_ids,
            finish_reason=seq.finish_reason,
            error=str(seq.error or "") or None,
            metrics=self.metrics(seq),
        )

    def metrics(self, seq: Sequence) -> RequestMetrics:
        """What became of a request."""
        first = last = None
        if seq.num_completion_tokens > 0:
            first = seq.first_token_time - seq.arrival_time
        if seq.num_completion_tokens > 1:
            last = seq.last_token_time - seq.first_token_time
            last /= seq.num_completion_tokens - 1
        return RequestMetrics(
            time_to_first_token=first,
            time_per_output_token=last,
            num_cached_tokens=seq.num_hit_tokens,
            num_preemptions=seq.num_preemptions,
        )

    def text_of(self, seq: Sequence) -> str:
        """A finished sequence's text, as far as it has not been taken.

        RuntimeError for one that another caller's failed step has swept away.
        """
        if seq.error is not None and seq.finish_reason == "abort":
            raise RuntimeError(f"the request was lost: {seq.error!r} in a step") from seq.error
        if self.tokenizer is None:
            return ""
        try:
            if seq.detokenizer is not None:
                seq.detokenizer.flush()
                return seq.detokenizer.take_ready()
            return Detokenizer(self.tokenizer).decode_all(seq.completion_token_ids)
        except Exception as error:
            seq.finish("error", error)
            return ""


def check_messages(messages: Messages) -> Messages:
    """The messages, each content one text; ValueError unless each has a role and a content."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"a conversation is a list of messages, got {messages!r}")
    checked = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"a message is a dict of role and content, got {message!r}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            content = "\n".join(map(text_of, content))
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise ValueError(f"role and content of a message must be text, got {message!r}")
        with as_value_error("a message is no Unicode text"):
            content.encode()
        checked.append({**message, "content": content})
    return checked


def text_of(part: Any) -> str:
    """The text of a part of a message's content; ValueError for a part of another type."""
    if not isinstance(part, dict):
        raise ValueError(f'a part of a content is {{"type": "text", "text": …}}, got {part!r}')
    if part.get("type") != "text":
        raise ValueError(f"a part of a content must be of type 'text', got {part.get('type')!r}")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"a part of a content holds no text: {part!r}")
    return part["text"]


def as_prompt_list(prompts: Prompt | list[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str) or isinstance(prompts, np.ndarray) and prompts.ndim == 1:
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts must be text, token ids or a list of these, got {prompts!r}")
    if prompts and isinstance(prompts[0], numbers.Integral):
        return [list(prompts)]
    return list(prompts)

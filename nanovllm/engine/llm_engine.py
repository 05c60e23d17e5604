"""The engine: requests in, a token a step, results out."""

import itertools
import random
from collections import deque
from collections.abc import Iterator
from os import PathLike, fspath
from typing import TypedDict

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.progress import Progress
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.loader import find_checkpoint
from nanovllm.utils.tokenizer import load_tokenizer

Prompt = str | list[int]
Messages = list[dict[str, str]]


class RequestOutput(TypedDict):
    """What `generate` returns for one prompt; `stream` yields it in pieces."""

    text: str
    token_ids: list[int]
    finish_reason: str | None


class LLMEngine:
    """Owns the requests, and grows them one step at a time."""

    def __init__(self, model: str | PathLike | None = None, **options):
        """`model` and `options` are the fields of `Config`; a misfit raises ValueError."""
        model = fspath(model) if isinstance(model, PathLike) else model
        self.config = Config.from_options(model=model, **options)
        folder = find_checkpoint(self.config.model)
        self.model_config = ModelConfig.from_folder(folder)
        self.max_model_len = min(
            self.config.max_model_len, self.model_config.max_position_embeddings
        )
        self.model_runner = ModelRunner(self.config, self.model_config, folder, self.max_model_len)
        self.tokenizer = load_tokenizer(folder)
        self.seeds = random.Random(self.config.seed)
        self.seq_ids = itertools.count()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def step(self) -> list[Sequence]:
        """Run the model once; returns the sequences that gained a token.

        Whatever is raised on the way, Ctrl-C included, the engine holds no request afterwards.
        """
        if self.is_finished():
            return []
        try:
            seqs = self.schedule()
            token_ids = self.model_runner.run(seqs)
            return self.postprocess(seqs, token_ids)
        except BaseException:
            self.reset()
            raise

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: a static batch, formed once the last one is done."""
        if not self.running:
            while self.waiting and len(self.running) < self.config.max_num_seqs:
                self.running.append(self.waiting.popleft())
                self.running[-1].status = SequenceStatus.RUNNING
        return self.running

    def postprocess(self, seqs: list[Sequence], token_ids: list[int]) -> list[Sequence]:
        """Append the sampled tokens; returns the sequences that were still unfinished."""
        grown = [seq for seq in seqs if not seq.is_finished]
        for seq, token_id in zip(seqs, token_ids, strict=True):
            if seq.is_finished:
                continue  # it keeps its place in the batch, and what it computes is thrown away
            seq.num_computed_tokens = seq.num_tokens
            seq.append_token(token_id)
            self.finish_if_done(seq)
        self.drop_finished()
        return grown

    def drop_finished(self) -> None:
        """Let go of the requests that are done; a running batch leaves as a whole."""
        self.waiting = deque(seq for seq in self.waiting if not seq.is_finished)
        if all(seq.is_finished for seq in self.running):
            self.running = []

    def is_finished(self) -> bool:
        """True when no request is left."""
        return not self.waiting and not self.running

    def finish_if_done(self, seq: Sequence) -> None:
        """Finish a sequence whose newest token ends it."""
        params, token_id, detokenizer = seq.params, seq.last_token, seq.detokenizer
        is_eos = token_id in self.model_config.eos_token_ids and not params.ignore_eos
        if detokenizer is not None:
            detokenizer.append(token_id)
            is_eos = is_eos or detokenizer.has_stopped
        if is_eos or token_id in params.stop_token_ids:
            seq.finish("stop")
        elif seq.num_completion_tokens == params.max_tokens:
            seq.finish("length")

    def make_sequence(self, prompt: Prompt, params: SamplingParams | None = None) -> Sequence:
        """A checked request that nothing has been done for yet; ValueError for a bad one."""
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
        if len(token_ids) + params.max_tokens > self.max_model_len:
            raise ValueError(
                f"a prompt of {len(token_ids)} tokens and max_tokens={params.max_tokens} exceed "
                f"max_model_len={self.max_model_len}"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the checkpoint has none")
        seq = Sequence(next(self.seq_ids), token_ids, params, params.seed)
        if params.stop:
            seq.detokenizer = Detokenizer(self.tokenizer, params.stop)
        return seq

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, in a list of its own."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the checkpoint has no tokenizer: give token ids, not text")
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, list | tuple):
            raise ValueError(f"a prompt is text or a list of token ids, got {prompt!r}")
        return list(prompt)

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue a request and return its id; ValueError, and nothing queued, for a bad one."""
        return self.add(self.make_sequence(prompt, sampling_params)).seq_id

    def add(self, seq: Sequence) -> Sequence:
        """Queue a checked sequence."""
        if self.model_runner is None:
            raise RuntimeError("the engine has exited: make a new one")
        if seq.seed is None:  # drawn now, so that a request that was refused draws nothing
            seq.seed = self.seeds.getrandbits(62)
        self.waiting.append(seq)
        return seq

    def abort(self, seq_id: int) -> None:
        """Forget an unfinished request; ValueError for an id that is not in the engine."""
        for seq in (*self.waiting, *self.running):
            if seq.seq_id == seq_id and not seq.is_finished:
                seq.finish("abort")
                self.drop_finished()
                return
        raise ValueError(f"request {seq_id} is not in the engine")

    def reset(self) -> None:
        """Forget every request, whatever state an exception left it in."""
        for seq in (*self.waiting, *self.running):
            if not seq.is_finished:
                seq.finish("abort")
        self.waiting, self.running = deque(), []

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        `prompts` is text, a list of token ids, or a list of these; `sampling_params` is one for
        all or a list of the same length. All are checked before any work: a bad one raises
        ValueError. After any exception, Ctrl-C included, the engine holds no request.
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
            with Progress(len(seqs), enabled=use_tqdm) as progress:
                while not all(seq.is_finished for seq in seqs):
                    progress.update(self.step())
            return [self.output(seq) for seq in seqs]
        except BaseException:
            self.reset()
            raise

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt and yield it in pieces, each holding what is new.

        The pieces' texts and token ids, joined, are what `generate` returns; the last piece alone
        has a finish_reason. A consumer that stops early aborts the request.
        """
        return self.stream_sequence(self.make_sequence(prompt, sampling_params))

    def stream_sequence(self, seq: Sequence) -> Iterator[RequestOutput]:
        """Yield a checked sequence's pieces as they come."""
        if self.tokenizer is not None:
            seq.detokenizer = Detokenizer(self.tokenizer, seq.params.stop)
        self.add(seq)
        num_tokens = num_chars = 0
        try:
            is_last = False
            while not is_last:
                if not seq.is_finished:  # else another caller's steps have finished it
                    self.step()
                is_last = seq.is_finished
                token_ids = seq.completion_token_ids[num_tokens:]
                if is_last:
                    text = self.output(seq)["text"][num_chars:]
                else:
                    text = seq.detokenizer.take_ready() if seq.detokenizer else ""
                if token_ids or is_last:
                    yield RequestOutput(
                        text=text, token_ids=token_ids, finish_reason=seq.finish_reason
                    )
                num_tokens, num_chars = num_tokens + len(token_ids), num_chars + len(text)
        except GeneratorExit:
            if not seq.is_finished:
                self.abort(seq.seq_id)
            raise
        except BaseException:
            self.reset()
            raise

    def chat(
        self,
        messages: Messages | list[Messages],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list, through the checkpoint's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.apply_chat_template(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def apply_chat_template(self, messages: Messages) -> list[int]:
        """The token ids of a conversation, up to where the assistant's answer begins."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("the checkpoint has no chat template")
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def output(self, seq: Sequence) -> RequestOutput:
        """A finished sequence's result; its text ends before the stop string that ended it."""
        token_ids = seq.completion_token_ids
        if seq.detokenizer is not None and seq.detokenizer.has_stopped:
            text = seq.detokenizer.text
        elif self.tokenizer is not None:
            text = self.tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=True)
        else:
            text = ""
        return RequestOutput(text=text, token_ids=token_ids, finish_reason=seq.finish_reason)

    def exit(self) -> None:
        """Give the model and its memory back; a second call does nothing."""
        self.reset()
        self.model_runner = None


def as_prompt_list(prompts: Prompt | list[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts must be text, token ids or a list of these, got {prompts!r}")
    if prompts and all(type(item) is int for item in prompts):
        return [list(prompts)]
    return list(prompts)

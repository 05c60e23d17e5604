"""The engine: requests in, a token a step, results out."""

import itertools
import random
from collections.abc import Iterator
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from time import perf_counter
from typing import Any

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.outputs import Outbox, RequestOutput, StreamPiece, output_of
from nanovllm.engine.parallel_runner import make_runner
from nanovllm.engine.pipeline import Pipeline
from nanovllm.engine.progress import Progress
from nanovllm.engine.requests import Limits, make_sequence, pair_up
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.turns import Turns
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.chat import Messages, as_conversations, encode_chat
from nanovllm.utils.checkpoint import find_checkpoint
from nanovllm.utils.tokenizer import Prompt, Prompts, encode, load_tokenizer


class LLMEngine:
    """Owns the requests, and grows them one step at a time. Threads may share it."""

    def __init__(self, model: str | PathLike | None = None, **options: Any) -> None:
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
        self.model_runner = self.make_runner(folder)  # until `exit`
        self.limits = self.make_limits()
        self.seeds = random.Random(self.config.seed)
        self.seq_ids = itertools.count()
        self.turns = Turns(on_error=self.fail_all)
        self.requests: dict[int, Sequence] = {}  # the unfinished ones, by their ids
        self.make_queues()
        self.pipeline = Pipeline()

    def make_runner(self, folder: Path) -> ModelRunner:
        """What runs the model of a checkpoint's folder."""
        return make_runner(self.config, self.model_config, folder, self.max_model_len)

    def make_queues(self) -> None:
        """Where the requests stand: in the scheduler's queues."""
        eos_token_ids = self.model_config.eos_token_ids
        self.scheduler = Scheduler(self.config, self.limits.num_blocks, eos_token_ids)

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

    def forget_finished(self, seqs: list[Sequence]) -> None:
        """What is done is no request of the engine's any more."""
        for seq in seqs:
            if seq.is_finished:
                self.requests.pop(seq.seq_id, None)

    def is_finished(self) -> bool:
        """True when no request is left."""
        self.turns.settle()
        return not self.requests

    def make_limits(self) -> Limits:
        """What every request has to fit in."""
        num_blocks, block_size = self.model_runner.num_blocks, self.config.kvcache_block_size
        return Limits(self.model_config.vocab_size, self.max_model_len, num_blocks, block_size)

    def reset_prefix_cache(self) -> None:
        """Forget what is kept of earlier requests, for example after the weights have changed."""
        self.turns.ask(lambda: self.scheduler.block_manager.reset_prefix_cache())

    def make_sequence(self, prompt: Prompt, params: SamplingParams | None = None) -> Sequence:
        """A checked request that nothing has been done for yet; ValueError for a bad one."""
        self.check_alive()
        return make_sequence(self.seq_ids, prompt, params, self.tokenizer, self.limits)

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids, in a list of its own."""
        return encode(self.tokenizer, prompt)

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
        if not hasattr(self, "model_runner"):
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

    def exit(self) -> None:
        """Give the model and its memory back, as soon as no step runs; twice does no harm."""
        self.turns.ask(self.close)
        while hasattr(self, "model_runner") and not self.turns.is_inside():
            with self.turns.turn():
                pass  # another thread's step has ended, or there was none

    def close(self) -> None:
        """Let go of the requests and of the model."""
        self.fail_all()
        if hasattr(self, "model_runner"):
            self.model_runner.exit()
            del self.model_runner

    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        `prompts` is text, a list of token ids, or a list of these; `sampling_params` is one for
        all or a list of the same length. All are checked before any work: a bad one raises
        ValueError. Whatever is raised, Ctrl-C included, none of its requests stays in the engine.
        A request that fails by itself gets the finish_reason "error", and the others go on.
        """
        seqs = [self.make_sequence(*request) for request in pair_up(prompts, sampling_params)]
        try:
            for seq in seqs:
                self.add(seq)
            with Progress(seqs, enabled=use_tqdm) as progress:
                while not all(seq.is_finished for seq in seqs):
                    self.step()
                    progress.update()
            return [output_of(seq, self.tokenizer) for seq in seqs]
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
        outbox = Outbox(seq, self.tokenizer)
        self.add(seq)
        try:
            yield from outbox.pieces(self.step)
        finally:
            self.drop([seq])

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
        conversations = as_conversations(messages)
        prompts = [self.apply_chat_template(c, chat_template_kwargs) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def apply_chat_template(
        self, messages: Messages, chat_template_kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        """The token ids of a conversation, up to where the assistant's answer begins or goes on."""
        return encode_chat(self.tokenizer, messages, chat_template_kwargs)

"""The one who steps the engine: asked and heard through a pipe, in a process or a thread."""

import logging
import select
from collections import deque
from multiprocessing.connection import Connection
from typing import NamedTuple

from nanovllm.engine.outputs import RequestMetrics, metrics_of
from nanovllm.engine.sequence import Sequence
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams


class Ask(NamedTuple):
    """A request that is to run; without parameters, one that nobody waits for any more."""

    key: int  # the asker's name for it
    token_ids: list[int] = []
    params: SamplingParams | None = None
    whole: bool = False  # nobody reads along: it is told once, at its end


class News(NamedTuple):
    """What has come of a request since the last news of it."""

    key: int
    token_ids: list[int]
    logprobs: list[dict[int, float]]  # of these tokens, where they were asked for
    finish_reason: str | None = None  # with the last, and only then
    error: str | None = None  # what went wrong, where it is "error" or "abort"
    metrics: RequestMetrics | None = None  # with the last
    prompt_logprobs: list[dict[int, float] | None] | None = None  # with the last, if asked for


class Load(NamedTuple):
    """How much the engine has to do, and has done."""

    num_running: int = 0
    num_waiting: int = 0
    used_blocks: float = 0.0  # the share of all
    num_preemptions: int = 0
    failure: str | None = None  # what the last step raised


logger = logging.getLogger("nanovllm")


class EngineLoop:
    """Steps an engine: takes what it is asked between two steps, and tells what came of each."""

    def __init__(self, llm: LLM, pipe: Connection):
        self.llm, self.pipe = llm, pipe
        self.seqs: dict[int, Sequence] = {}  # the unfinished ones, by the asker's key
        self.keys: dict[int, int] = {}  # their ids -> the keys
        self.untold: list[tuple] = []  # news that has not been sent
        self.failure: str | None = None
        self.room = select.poll()
        self.room.register(pipe.fileno(), select.POLLOUT)

    def run(self) -> None:
        """Step until the other end of the pipe is closed; an idle engine sleeps."""
        try:
            while True:
                self.take_asks()
                self.tell(self.step() if self.seqs else [])
        except (EOFError, OSError):
            self.llm.drop(list(self.seqs.values()))  # nobody is there any more
        finally:
            self.pipe.close()

    def take_asks(self) -> None:
        """Do what has been asked for; where there is nothing to do, wait until something is."""
        is_idle = not self.seqs
        while self.pipe.poll(None if is_idle else 0):
            is_idle = False
            for ask in self.pipe.recv():
                if ask is None:
                    raise EOFError("the asker has said goodbye")
                if ask.params is None:
                    self.forget(ask.key)
                else:
                    self.add(ask)

    def add(self, ask: Ask) -> None:
        """Queue a request; one that does not fit this engine ends at once."""
        try:
            seq = self.llm.make_sequence(ask.token_ids, ask.params)
            seq.unread = None if ask.whole else deque()
            self.seqs[ask.key], self.keys[seq.seq_id] = self.llm.add(seq), ask.key
        except Exception as error:
            self.untold.append(tuple(News(ask.key, [], [], "error", str(error))))

    def forget(self, key: int) -> None:
        """Nobody waits for a request any more; it may have ended already."""
        if (seq := self.seqs.pop(key, None)) is not None:
            del self.keys[seq.seq_id]
            self.llm.drop([seq])

    def step(self) -> list[Sequence]:
        """A step's sequences that gained a token, or ended; after a failure, those that it lost."""
        try:
            grown, self.failure = self.llm.step(), None
            return grown
        except Exception as error:
            logger.exception("a step failed")
            self.failure = repr(error)
            return [seq for seq in self.seqs.values() if seq.is_finished]

    def tell(self, grown: list[Sequence]) -> None:
        """Send what is new of these sequences, in one message; where there is no room, later."""
        for seq in grown:
            if seq.seq_id in self.keys and (seq.unread is not None or seq.is_finished):
                self.untold.append(tuple(self.news_of(seq)))
        if not self.seqs or self.room.poll(0):
            self.pipe.send((self.untold, tuple(self.load())))
            self.untold = []

    def news_of(self, seq: Sequence) -> News:
        """What is new of a sequence: as a rule one token."""
        key, params = self.keys[seq.seq_id], seq.params
        new = list(seq.completion_token_ids if seq.unread is None else seq.unread)
        if seq.unread is not None:
            seq.unread.clear()
        logprobs = seq.logprobs[-len(new) :] if new and params.logprobs is not None else []
        if not seq.is_finished:
            return News(key, new, logprobs)
        del self.seqs[key], self.keys[seq.seq_id]
        error = None if seq.error is None else str(seq.error) or repr(seq.error)
        prompt = None if params.prompt_logprobs is None else seq.prompt_logprobs
        return News(key, new, logprobs, seq.finish_reason, error, metrics_of(seq), prompt)

    def load(self) -> Load:
        """How much there is to do."""
        scheduler = self.llm.scheduler
        used = 1 - len(scheduler.block_manager.free_blocks) / scheduler.num_blocks
        sizes = len(scheduler.running), len(scheduler.waiting)
        return Load(*sizes, used, scheduler.num_preemptions, self.failure)

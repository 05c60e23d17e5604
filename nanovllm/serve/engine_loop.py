"""The one who steps the engine: asked and heard through a pipe, in a process or a thread."""

import logging
import os
import pickle
import select
import socket
import struct
from collections import deque
from multiprocessing.connection import Connection
from typing import NamedTuple

from nanovllm.engine.outputs import RequestMetrics, metrics_of
from nanovllm.engine.sequence import Sequence
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.serve.metrics import Metrics


class Ask(NamedTuple):
    """A request that is to run; without parameters, one that nobody waits for any more."""

    key: int  # the asker's name for it
    token_ids: list[int] = []
    params: SamplingParams | None = None
    whole: bool = False  # nobody reads along: it is told once, at its end


WATCH = -1  # the key of an ask for a report


class News(NamedTuple):
    """What has come of a request since the last news of it."""

    key: int
    token_ids: list[int]
    logprobs: list[dict[int, float]]  # of these tokens, where they were asked for
    finish_reason: str | None = None  # with the last, and only then
    error: str | None = None  # what went wrong, where it is "error" or "abort"
    metrics: RequestMetrics | None = None  # with the last
    prompt_logprobs: list[dict[int, float] | None] | None = None  # with the last, if asked for


class Report(NamedTuple):
    """How the engine is, and what it has done."""

    failure: str | None  # what the last step raised
    metrics: bytes  # in Prometheus's text format


MOST_NEWS = 512  # in a message, which is read in one go


class Asker:
    """The engine's end of one pipe."""

    def __init__(self, pipe: Connection):
        self.pipe, self.door = pipe, socket.socket(fileno=os.dup(pipe.fileno()))
        self.untold: list[tuple] = []  # news that no message holds yet
        self.report: Report | None = None
        self.rest = memoryview(b"")  # of a message that is on its way

    def tell(self) -> None:
        """Send what there is to tell, as far as the pipe has room; the rest later."""
        while self.rest or self.untold or self.report:
            if not self.rest:
                text = pickle.dumps((self.untold[:MOST_NEWS], self.report))
                self.rest = memoryview(struct.pack("!i", len(text)) + text)  # as `recv` wants it
                del self.untold[:MOST_NEWS]
                self.report = None
            try:
                self.rest = self.rest[self.door.send(self.rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                return


logger = logging.getLogger("nanovllm")


class EngineLoop:
    """Steps an engine: takes what it is asked between two steps, and tells what came of each."""

    def __init__(self, llm: LLM, *pipes: Connection):
        self.llm, self.inbox = llm, select.poll()
        self.askers = {pipe.fileno(): Asker(pipe) for pipe in pipes}
        for number in self.askers:
            self.inbox.register(number, select.POLLIN)
        self.seqs: dict[tuple[Asker, int], Sequence] = {}  # the unfinished ones, by their keys
        self.keys: dict[int, tuple[Asker, int]] = {}  # their ids -> the keys
        self.failure: str | None = None
        self.metrics = Metrics(llm, self.seqs)

    def run(self) -> None:
        """Step until the other ends of all pipes are closed; an idle engine sleeps."""
        while self.askers:
            self.take_asks()
            if self.seqs:
                self.note(self.step())
            for number, asker in list(self.askers.items()):
                try:
                    asker.tell()
                    room = select.POLLOUT if asker.rest else 0
                    self.inbox.modify(number, select.POLLIN | room)
                except OSError:
                    self.lose(asker)

    def take_asks(self) -> None:
        """Do what has been asked for; where there is nothing to do, wait until something is."""
        for number, _ in self.inbox.poll(0 if self.seqs else None):
            asker = self.askers[number]
            try:
                while asker.pipe.poll():
                    for ask in asker.pipe.recv():
                        self.take(asker, ask)
            except (EOFError, OSError):  # it has said goodbye, or is gone
                self.lose(asker)

    def take(self, asker: Asker, ask: Ask | None) -> None:
        """Do one thing that was asked for; EOFError for a goodbye."""
        if ask is None:
            raise EOFError("the asker has said goodbye")
        if ask.key == WATCH:
            if self.failure is not None and not self.seqs:
                self.failure = self.try_step()
            asker.report = Report(self.failure, self.metrics.page())
        elif ask.params is None:
            self.forget((asker, ask.key))
        else:
            self.add(asker, ask)

    def try_step(self) -> str | None:
        """What a step raises now, if it raises anything."""
        try:
            self.llm.generate([[0]], SamplingParams(max_tokens=1), use_tqdm=False)
            return None
        except Exception as error:
            return repr(error)

    def add(self, asker: Asker, ask: Ask) -> None:
        """Queue a request; one that does not fit this engine ends at once."""
        key = asker, ask.key
        try:
            seq = self.llm.make_sequence(ask.token_ids, ask.params)
            seq.unread = None if ask.whole else deque()
            self.seqs[key], self.keys[seq.seq_id] = self.llm.add(seq), key
        except Exception as error:
            asker.untold.append(tuple(News(ask.key, [], [], "error", str(error))))

    def lose(self, asker: Asker) -> None:
        """Nobody is at the other end of a pipe any more."""
        self.inbox.unregister(asker.pipe.fileno())
        del self.askers[asker.pipe.fileno()]
        for key in [key for key in self.seqs if key[0] is asker]:
            self.forget(key)
        for end in asker.door, asker.pipe:
            end.close()

    def forget(self, key: tuple[Asker, int]) -> None:
        """Nobody waits for a request any more; it may have ended already."""
        if (seq := self.seqs.pop(key, None)) is not None:
            del self.keys[seq.seq_id]
            self.llm.drop([seq])
            self.metrics.ended.labels("abort").inc()

    def step(self) -> list[Sequence]:
        """A step's sequences that gained a token, or ended; after a failure, those that it lost."""
        try:
            grown, self.failure = self.llm.step(), None
            return grown
        except Exception as error:
            logger.exception("a step failed")
            self.failure = repr(error)
            return [seq for seq in self.seqs.values() if seq.is_finished]

    def note(self, grown: list[Sequence]) -> None:
        """Put down what is new of these sequences, for those who asked for them."""
        for seq in grown:
            if seq.seq_id in self.keys and (seq.unread is not None or seq.is_finished):
                asker, key = self.keys[seq.seq_id]
                news = self.news_of(seq, key)
                self.metrics.note(seq, len(news.token_ids), news.metrics)
                asker.untold.append(tuple(news))

    def news_of(self, seq: Sequence, key: int) -> News:
        """What is new of a sequence: as a rule one token."""
        params = seq.params
        new = list(seq.completion_token_ids if seq.unread is None else seq.unread)
        if seq.unread is not None:
            seq.unread.clear()
        logprobs = seq.logprobs[-len(new) :] if new and params.logprobs is not None else []
        if not seq.is_finished:
            return News(key, new, logprobs)
        del self.seqs[self.keys.pop(seq.seq_id)]
        error = None if seq.error is None else str(seq.error) or repr(seq.error)
        prompt = None if params.prompt_logprobs is None else seq.prompt_logprobs
        return News(key, new, logprobs, seq.finish_reason, error, metrics_of(seq), prompt)

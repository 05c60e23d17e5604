"""The other end of the pipe: requests of an event loop, and what has come of them."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.outputs import StreamPiece
from nanovllm.engine.sequence import Sequence
from nanovllm.serve.engine_loop import WATCH, Ask, News, Report


class Answer:
    """One request on its way: what has come of it, for one reader."""

    def __init__(self, key: int, seq: Sequence, tokenizer: Any, has_news: asyncio.Event):
        self.key, self.params, self.has_news = key, seq.params, has_news
        self.prompt = seq.token_ids
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer, seq.params.stop)
        self.unread: deque[News] = deque()
        self.last: News | None = None  # once it has been taken

    def take(self) -> StreamPiece:
        """What has come since the last call; with a finish_reason, and only then, it is the last.

        RuntimeError for a request that failed.
        """
        token_ids, logprobs, reason = [], [], None
        while self.unread:
            news = self.unread.popleft()
            token_ids += news.token_ids
            logprobs += news.logprobs
            if (reason := news.finish_reason) is not None:
                self.last = news
        if self.last is not None and reason in ("error", "abort"):
            raise RuntimeError(self.last.error or "the request was lost")
        text = self.read(token_ids, is_last=reason is not None)
        told = logprobs if self.params.logprobs is not None else None
        return StreamPiece(text=text, token_ids=token_ids, finish_reason=reason, logprobs=told)

    def read(self, token_ids: list[int], is_last: bool) -> str:
        """The text that more tokens bring."""
        if self.detokenizer is None:
            return ""
        self.detokenizer.extend(token_ids)
        if is_last:
            self.detokenizer.flush()
        return self.detokenizer.take_ready()


async def pieces(answers: list[Answer]) -> AsyncIterator[tuple[int, StreamPiece]]:
    """(Index, piece) of all answers of one call, as they come; each one's last has a reason."""
    has_news, unfinished = answers[0].has_news, dict(enumerate(answers))
    while unfinished:
        await has_news.wait()
        has_news.clear()
        for index, answer in list(unfinished.items()):
            if not answer.unread:
                continue
            piece = answer.take()
            if piece["finish_reason"] is not None:
                del unfinished[index]
            yield index, piece


ENDED = "the engine has ended"


class Busy(Exception):
    """More requests are open than the server was told to take."""


class EngineClient:
    """Puts requests to an engine and hands out what comes back, in one event loop.

    The loop never waits for the engine: a thread of its own sends, and what has come is read when
    it is there. Nor does the engine wait for the loop: it sends where there is room.
    """

    def __init__(self, pipe: Connection, max_open: int = 1024, share: int | None = None):
        """max_open: of all processes before the engine; share: of this one (default: all)."""
        try:
            about = pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(ENDED) from error
        if isinstance(about, Exception):
            raise about
        self.about, self.pipe = about, pipe
        self.max_open, self.share = max_open, max_open if share is None else share
        self.answers: dict[int, Answer] = {}  # the open ones
        self.on_loss: Callable[[], None] = lambda: None
        self.keys = count()
        self.asks: SimpleQueue[Ask | None] = SimpleQueue()
        self.watchers: list[asyncio.Future[Report]] = []
        self.is_alive, self.is_closing = True, False

    def start(self) -> None:
        """Begin to send and to receive; in the event loop that the answers are read in."""
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self.pipe.fileno(), self.receive)
        os.set_blocking(self.pipe.fileno(), True)  # uvloop has changed it; `recv` needs it
        Thread(target=self.send, name="asks", daemon=True).start()

    def check_room(self, num: int) -> None:
        """May so many be asked for now? ValueError where they never may; Busy, where later."""
        if not self.is_alive:
            raise RuntimeError(ENDED)
        if num > self.max_open:
            raise ValueError(f"{num} answers are asked for at once, and {self.max_open} may be")
        if self.answers and len(self.answers) + num > self.share:
            raise Busy(f"{len(self.answers)} requests are open, and {self.share} may be")

    def submit(self, seqs: list[Sequence], whole: bool = False) -> list[Answer]:
        """Ask for requests that belong together; Busy where there are too many already.

        `whole` ones bring one piece, at their end.
        """
        self.check_room(len(seqs))  # once more: others may have come while these were made
        has_news, tokenizer = asyncio.Event(), self.about.tokenizer
        answers = [Answer(next(self.keys), seq, tokenizer, has_news) for seq in seqs]
        for answer in answers:
            self.answers[answer.key] = answer
            self.asks.put(Ask(answer.key, answer.prompt, answer.params, whole))
        return answers

    def leave(self, answers: list[Answer]) -> None:
        """Nobody waits for these any more: the engine is to forget those that have not ended."""
        for answer in answers:
            if self.answers.pop(answer.key, None) is not None:
                self.asks.put(Ask(answer.key))

    def hand_out(self, told: list[News]) -> None:
        """Give each its news."""
        for news in told:
            if (answer := self.answers.get(news.key)) is not None:
                if news.finish_reason is not None:
                    del self.answers[news.key]
                answer.unread.append(news)
                answer.has_news.set()

    async def report(self) -> Report:
        """How the engine is, between two of its steps; RuntimeError where it has ended."""
        if not self.is_alive:
            raise RuntimeError(ENDED)
        self.watchers.append(watcher := self.loop.create_future())
        self.asks.put(Ask(WATCH))
        return await watcher

    def send(self) -> None:
        """A thread's life: bring what is asked for to the engine, which may be in a step.

        All that waits goes in one message: a thread gets its turn seldom where another is busy.
        """
        asks: list[Ask | None] = [Ask(WATCH)]
        try:
            while asks[-1] is not None:  # None is goodbye
                asks = [self.asks.get()]
                while not self.asks.empty():
                    asks.append(self.asks.get())
                self.pipe.send(asks)
        except OSError:
            pass  # the engine is gone: `receive` says so

    def receive(self) -> None:
        """Something has come through the pipe, or it has ended.

        A few messages at a time: an engine that is faster than this loop must not keep it here.
        """
        try:
            for _ in range(8):
                if not self.pipe.poll():
                    break
                told, report = self.pipe.recv()
                self.hand_out([News(*news) for news in told])
                if report is not None:
                    self.tell_watchers(report)
        except (EOFError, OSError):
            self.loop.remove_reader(self.pipe.fileno())
            self.is_alive = False
            if not self.is_closing:
                self.give_up()

    def give_up(self) -> None:
        """The engine is gone: whoever waits is told."""
        self.hand_out([News(key, [], [], "abort", ENDED) for key in self.answers])
        self.tell_watchers(None)
        self.on_loss()

    def tell_watchers(self, report: Report | None) -> None:
        """Whoever still waits for a report gets it, or is told that there is none."""
        for watcher in self.watchers:
            if not watcher.done() and report is not None:
                watcher.set_result(report)
            elif not watcher.done():
                watcher.set_exception(RuntimeError(ENDED))
        self.watchers.clear()

    def close(self) -> None:
        """Let the engine end."""
        self.is_closing = self.is_alive  # else it has been lost, and whoever serves it says so
        self.asks.put(None)

    @property
    def is_lost(self) -> bool:
        """Has the engine ended though nobody has let it?"""
        return not self.is_alive and not self.is_closing

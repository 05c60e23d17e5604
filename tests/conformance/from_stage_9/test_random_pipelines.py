"""Random operations on an engine with two steps in flight, whose model is plain Python.

The model keeps a list of slots, as the cache does. A step writes into each slot that it computes
the name of the text up to there, finds its own text in all slots that it reads, and samples a token
that follows from this text alone, so that each request has one right answer. The device is a step
ahead of the host: what it sampled last is known to it, and not to the scheduler. Requests are
cancelled and streams closed between steps, in the middle of a step, and from several threads.

For longer, and to be told how many operations ran:

    NANOVLLM_OPERATIONS=200000 python -m pytest tests/conformance -k random_pipelines
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest
from in_flight import check_done, check_in_flight
from memory import HASHES

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.pipeline import Pipeline
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.turns import Turns

OPERATIONS = int(os.environ.get("NANOVLLM_OPERATIONS", 0)) or 12_000  # at least
EOS = 2
OTHERS = ["forget", "forget", "reset", "fail"]


class Interrupted(Exception):
    """What the model raises now and then."""


class Read:
    """A step's tokens, as of its launch."""

    def __init__(self, token_ids: list[int]):
        self.sampled = token_ids

    def token_ids(self) -> list[int]:
        return list(self.sampled)

    def told(self, token_ids: list[int]) -> tuple:
        return ()


class PlainModel:
    """A model runner and its device; texts are known by names, equal texts by equal names."""

    def __init__(self, block_size: int, luck: int):
        self.size, self.luck = block_size, luck
        self.names: dict[tuple[int, int], int] = {}  # text: the name of its beginning, last token
        self.slots: dict[int, int] = {}
        self.sampled: list[int] = []  # by the newest step
        self.fails_in = -1  # steps until one fails; never, if negative
        self.num_runs = 0
        self.meanwhile: list[Callable[[], None]] = []  # what others do in the middle of a step
        self.past_the_end: dict[Sequence, int] = {}  # steps with a request that had ended

    def name(self, parent: int, token_id: int) -> int:
        return self.names.setdefault((parent, token_id), len(self.names))

    def next_token(self, name: int) -> int:
        """0, 1 or EOS, and which one is decided by the text."""
        return (0, 0, 0, 1, 1, EOS)[Random(name * 1009 + self.luck).randrange(6)]

    def answer(self, prompt: list[int], params: SamplingParams) -> list[int]:
        """The tokens that this prompt must get."""
        name, found = -1, []
        for token_id in prompt:
            name = self.name(name, token_id)
        while len(found) < params.max_tokens and not (
            found and found[-1] == EOS and not params.ignore_eos
        ):
            found.append(self.next_token(name))
            name = self.name(name, found[-1])
        return found

    def run(self, seqs: list[Sequence]) -> Read:
        """A step: all write, then all read."""
        self.num_runs += 1
        self.fails_in -= 1
        if self.fails_in == 0:
            raise Interrupted
        texts, written = [], set()
        for seq in seqs:
            start = seq.num_computed_tokens
            stop = start + seq.num_scheduled_tokens
            assert 0 <= start < stop <= len(seq) and len(seq.block_table) * self.size >= stop
            assert stop < seq.num_prompt_tokens + seq.params.max_tokens, "the last is never run"
            token_ids = [t if t >= 0 else self.sampled[-1 - t] for t in seq.token_ids[:stop]]
            names = list(itertools.accumulate(token_ids, self.name, initial=-1))[1:]
            texts.append(names)
            for at in range(max(start, seq.num_cached_tokens), stop):
                assert self.slot(seq, at) not in written, "two write into one slot"
                written.add(self.slot(seq, at))
                self.slots[self.slot(seq, at)] = names[at]
            if EOS in token_ids[seq.num_prompt_tokens :] and not seq.params.ignore_eos:
                self.past_the_end[seq] = self.past_the_end.get(seq, 0) + 1
        while self.meanwhile:
            self.meanwhile.pop()()
        for seq, names in zip(seqs, texts):
            found = [self.slots.get(self.slot(seq, at)) for at in range(len(names))]
            assert found == names, "it reads another text"
        self.sampled = [self.next_token(names[-1]) for names in texts]
        return Read(self.sampled)

    def slot(self, seq: Sequence, at: int) -> int:
        return seq.block_table[at // self.size] * self.size + at % self.size


def make_engine(random: Random) -> LLM:
    """The engine's own steps and scheduler around a plain model."""
    size, budget = random.randint(1, 5), random.choice((1, 2, 3, 5, 9, 40))
    llm = LLM.__new__(LLM)
    llm.config = Config(
        device="cpu",
        kvcache_block_size=size,
        max_num_batched_tokens=budget,
        max_num_seqs=random.randint(1, 6),
        enable_prefix_caching=random.random() < 0.75,
        async_scheduling=random.random() < 0.9,
    )
    num_blocks = max(random.choice((*range(1, 13), 100, 200)), -(-2 // size))
    llm.scheduler = Scheduler(llm.config, num_blocks, (EOS,))
    llm.model_runner = PlainModel(size, random.randrange(10**6))
    llm.pipeline = Pipeline()
    llm.requests, llm.turns, llm.tokenizer = {}, Turns(llm.fail_all), None
    return llm


class Round:
    """One engine, and what its requests must get."""

    totals = dict.fromkeys(
        ("operations", "hits", "preemptions", "overruns", "failures", "meanwhile", "pieces"), 0
    )

    def __init__(self, number: int):
        self.random = Random(number)
        self.llm = make_engine(self.random)
        self.scheduler, self.model = self.llm.scheduler, self.llm.model_runner
        self.seqs: list[Sequence] = []
        self.streams: dict[Sequence, Iterator] = {}
        self.heard: dict[Sequence, list[int]] = {}  # by the readers of streams
        self.answers: dict[Sequence, list[int]] = {}

    def add(self) -> None:
        """A prompt that begins like an earlier text, or like none."""
        random, size = self.random, self.llm.config.kvcache_block_size
        capacity = self.scheduler.num_blocks * size
        prompt = []
        if self.seqs and random.random() < 0.7:
            earlier = random.choice(self.seqs)
            prompt = earlier.token_ids[: random.randint(0, earlier.num_known_tokens)]
        prompt += [random.randrange(2) for _ in range(random.randint(0, 6))]
        prompt = prompt[: capacity - 1] or [0]
        params = SamplingParams(
            max_tokens=min(random.choice((1, 2, 5, 20)), capacity - len(prompt)),
            ignore_eos=random.random() < 0.3,
        )
        seq = Sequence(len(self.seqs), prompt, params, seed=0)
        self.answers[seq] = self.model.answer(prompt, params)
        self.seqs.append(seq)
        if random.random() < 0.3:
            self.streams[seq] = self.llm.stream_sequence(seq)
            self.read(seq)
        else:
            self.llm.add(seq)

    def read(self, seq: Sequence) -> None:
        """The next piece of a stream holds the next tokens of the answer."""
        try:
            piece = next(self.streams[seq])
        except Interrupted:
            self.after_failure()
        except RuntimeError as error:  # it was lost in another reader's step
            assert isinstance(error.__cause__, Interrupted)
        else:
            self.totals["pieces"] += 1
            found, answer = self.heard.setdefault(seq, []), self.answers[seq]
            found += piece["token_ids"]
            assert found == answer[: len(found)], "another text's token"
            assert (piece["finish_reason"] is not None) == seq.is_finished
            if piece["finish_reason"] in ("stop", "length"):
                assert found == answer
        if seq.is_finished:
            self.streams.pop(seq, None)

    def after_failure(self) -> None:
        """All that was in the engine is gone."""
        self.totals["failures"] += 1
        check_done(self.llm)
        assert all(seq.is_finished for seq in self.seqs)

    def step(self) -> None:
        """One step of the engine; each token that comes is the right one."""
        before = {seq: seq.num_completion_tokens for seq in self.seqs}
        preemptions = self.scheduler.num_preemptions
        try:
            grown = self.llm.step()
        except Interrupted:
            self.after_failure()
            return
        self.totals["preemptions"] += self.scheduler.num_preemptions - preemptions
        for seq in self.seqs:
            found, answer = seq.completion_token_ids, self.answers[seq]
            assert len(found) == before[seq] + (seq in grown)
            assert found == answer[: len(found)], "another text's token"
            if seq.finish_reason != "abort":
                ended = len(found) == len(answer)
                is_stopped = answer[-1] == EOS and not seq.params.ignore_eos
                reason = ("stop" if is_stopped else "length") if ended else None
                assert (seq.is_finished, seq.finish_reason) == (ended, reason)

    def disturb(self) -> None:
        """Cancel a request, forget the cache's contents, lose all, or let a step fail.

        Half of it comes in the middle of a step, and takes effect when that has ended.
        """
        random, what = self.random, self.random.choice(["abort"] * 6 + ["close"] * 3 + OTHERS)
        if what == "fail":
            self.model.fails_in = random.randint(1, 4)
        elif random.random() < 0.5:
            self.model.meanwhile.append(lambda: self.change(what, inside=True))
        else:
            self.change(what, inside=False)

    def change(self, what: str, inside: bool) -> None:
        """What a caller can do to the requests."""
        random, scheduler = self.random, self.scheduler
        self.totals["meanwhile"] += inside
        seqs = [*scheduler.running, *scheduler.waiting]
        before = [(list(seq.block_table), list(seq.token_ids), seq.status) for seq in seqs]
        gone = []
        if what == "abort" and self.llm.requests:
            gone = [random.choice(list(self.llm.requests.values()))]
            self.llm.abort(gone[0].seq_id)
        elif what == "close" and self.streams:
            gone = [random.choice(list(self.streams))]
            self.streams.pop(gone[0]).close() if not self.is_read(gone[0]) else gone.clear()
        elif what == "forget":
            self.llm.reset_prefix_cache()
        elif what == "reset":
            self.llm.reset()
            gone = seqs
        if inside:
            after = [(list(seq.block_table), list(seq.token_ids), seq.status) for seq in seqs]
            assert before == after, "a running step's requests were changed"
        else:
            assert all(seq.is_finished and seq.num_pending_tokens == 0 for seq in gone)

    def is_read(self, seq: Sequence) -> bool:
        """Is this stream being read at the moment? It can't be closed from inside itself."""
        return getattr(self.streams[seq], "gi_running", False)

    def run(self, num_operations: int) -> None:
        """Operations at random; then everything comes to its end, and in time."""
        for _ in range(num_operations):
            chance = self.random.random()
            if chance < 0.25 and sum(not seq.is_finished for seq in self.seqs) < 10:
                self.add()
            elif chance < 0.32:
                self.disturb()
            elif chance < 0.5 and self.streams:
                self.read(self.random.choice(list(self.streams)))
            else:
                self.step()
            check_in_flight(self.llm)
        self.model.meanwhile.clear()
        left = [seq for seq in self.seqs if not seq.is_finished]
        for _ in range(sum(s.num_prompt_tokens + s.params.max_tokens + 2 for s in left)):
            if not self.scheduler.is_finished():
                self.step()
                check_in_flight(self.llm)
        assert all(seq.is_finished for seq in self.seqs), "a request waits for ever"
        assert self.llm.step() == []
        check_done(self.llm)
        assert max(self.model.past_the_end.values(), default=0) <= 1, "one step too many, no more"
        self.totals["operations"] += num_operations
        self.totals["hits"] += self.scheduler.block_manager.num_hit_tokens
        self.totals["overruns"] += len(self.model.past_the_end)


def test_random_pipelines(monkeypatch, capsys):
    """Hits, preemptions, failures and steps past an end occur, or they would test little."""
    for number in itertools.count():
        with monkeypatch.context() as patch:
            if number % 5 == 4:
                hashing = HASHES[sorted(HASHES)[number // 5 % 2]]
                patch.setattr(BlockManager, "compute_hash", staticmethod(hashing))
            try:
                Round(number).run(120)
            except BaseException:
                print(f"round {number}")
                raise
        if Round.totals["operations"] >= OPERATIONS:
            break
    if os.environ.get("NANOVLLM_OPERATIONS"):
        with capsys.disabled():
            print("\n" + ", ".join(f"{value:,} {name}" for name, value in Round.totals.items()))
    assert min(Round.totals.values()) > 10, Round.totals


@pytest.mark.parametrize("number", range(4))
def test_random_calls_from_several_threads(number):
    """Each thread gets the answers to its own requests, whatever the others do meanwhile."""
    random = Random(1000 + number)
    llm = make_engine(random)
    model, capacity = llm.model_runner, llm.scheduler.num_blocks * llm.config.kvcache_block_size
    model.meanwhile = Pauses()
    errors, ids, work = [], itertools.count(), []
    for _ in range(6 * 25):
        prompt = [random.randrange(2) for _ in range(random.randint(1, 6))][: capacity - 1]
        params = SamplingParams(max_tokens=min(random.choice((1, 3, 9)), capacity - len(prompt)))
        answer = model.answer(prompt, params)  # in this thread, for it gives names to texts
        work.append((prompt, params, answer, random.choice(("read", "step", "close", "abort"))))

    def call(share) -> None:
        try:
            for prompt, params, answer, how in share:
                seq = Sequence(next(ids), list(prompt), params, seed=0)
                if how in ("read", "close"):
                    found, pieces = [], llm.stream_sequence(seq)
                    for piece in itertools.islice(pieces, 2 if how == "close" else None):
                        found += piece["token_ids"]
                    pieces.close()
                    assert found == answer if how == "read" else found == answer[: len(found)]
                    continue
                llm.add(seq)
                while how == "step" and not seq.is_finished:
                    llm.step()
                llm.drop([seq])
                llm.reset_prefix_cache() if how == "abort" else None
                assert how != "step" or seq.completion_token_ids == answer
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        shares = [threading.Thread(target=call, args=[work[i::6]], daemon=True) for i in range(6)]
        for thread in shares:
            thread.start()
        for thread in shares:
            thread.join(120)
            assert not thread.is_alive(), "a thread waits for ever"
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    while not llm.scheduler.is_finished():  # requests that were dropped between two steps
        llm.step()
    check_done(llm)


class Pauses(list):
    """In place of what others do in a step: time for them to do it."""

    def __bool__(self) -> bool:
        time.sleep(1e-5)
        return False


def test_the_plain_model_sees_a_wrong_slot():
    """Or it could not be trusted above: one block of another request is enough."""
    llm = make_engine(Random(3))
    llm.config = Config(device="cpu", kvcache_block_size=2, async_scheduling=True)
    llm.scheduler = Scheduler(llm.config, 12, (EOS,))
    llm.model_runner = PlainModel(2, 0)
    for number, prompt in enumerate(([0, 1, 0], [1, 1, 1])):
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        llm.add(Sequence(number, prompt, params, seed=0))
    llm.step()
    first, second = llm.scheduler.running
    first.block_table[0] = second.block_table[0]
    with pytest.raises(AssertionError, match="another text"):
        llm.step()

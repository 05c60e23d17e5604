"""Random operations on the scheduler and its blocks, against a plain model of the cache.

The model is a list of slots. A step writes into each slot that it computes the name of the text up
to there, and each running sequence must find its own text in all of its slots. No neural network
is run: the tokens are drawn at random, from so few that texts coincide.

For longer, and to be told how many operations ran:

    NANOVLLM_OPERATIONS=200000 python -m pytest tests/conformance -k random_operations
"""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from memory import HASHES, account, num_free

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

OPERATIONS = int(os.environ.get("NANOVLLM_OPERATIONS", 0))  # at least; 0: one short round
EOS = 2
TOKENS = st.sampled_from([0] * 6 + [1] * 3 + [EOS])
MOST_SEQS = 6
REQUEST = st.fixed_dictionaries(
    dict(
        pick=st.integers(0, 99),
        cut=st.integers(0, 40),
        tails=st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=3),
        max_tokens=st.integers(1, 20),
        ignore_eos=st.booleans(),
    )
)


class Operations(RuleBasedStateMachine):
    """Requests come, grow, are cancelled; after each step the books and the slots are checked."""

    num_operations = num_hits = num_preemptions = 0  # over all examples

    @initialize(
        block_size=st.integers(1, 5),
        num_blocks=st.sampled_from([*range(1, 13), 100, 200]),
        budget=st.integers(1, 9),
        max_num_seqs=st.integers(1, MOST_SEQS),
        cached=st.sampled_from([True, True, True, False]),
        hashing=st.sampled_from([None] * 4 + list(HASHES)),
        request=REQUEST,
    )
    def start(self, block_size, num_blocks, budget, max_num_seqs, cached, hashing, request):
        self.patch = pytest.MonkeyPatch()
        if hashing:
            self.patch.setattr(BlockManager, "compute_hash", staticmethod(HASHES[hashing]))
        self.size, self.budget, self.cached = block_size, budget, cached
        self.num_blocks = num_blocks + (block_size == num_blocks == 1)  # room for two tokens
        self.max_num_seqs = min(max_num_seqs, budget)
        config = Config(
            device="cpu",
            kvcache_block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=cached,
        )
        self.scheduler = Scheduler(config, self.num_blocks, (EOS,))
        self.seqs: dict[int, Sequence] = {}  # all that ever came
        self.names: dict[tuple[int, int], int] = {}  # text: the name of its beginning, last token
        self.slots: dict[int, tuple[int, int]] = {}  # slot -> name of the text, resets before
        self.num_resets, self.resets_before = 0, {}  # in all, and before a request was admitted
        self.queue(**request)

    # ---- Operations ----

    @property
    def unfinished(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @precondition(lambda self: len(self.unfinished) < 12)
    @rule(request=REQUEST)
    def add(self, request):
        self.queue(**request)

    def queue(self, pick, cut, tails, max_tokens, ignore_eos):
        """Queue requests whose prompts begin like an earlier text."""
        capacity = self.num_blocks * self.size
        earlier = self.seqs[pick % len(self.seqs)].token_ids[:cut] if self.seqs else []
        for tail in tails:
            Operations.num_operations += 1
            prompt = [*earlier, *tail][: capacity - 1] or [0]
            params = SamplingParams(
                max_tokens=min(max_tokens, capacity - len(prompt)), ignore_eos=ignore_eos
            )
            seq = Sequence(len(self.seqs), prompt, params, seed=0)
            self.seqs[seq.seq_id] = seq
            self.scheduler.add(seq)
            self.check_books()

    @precondition(lambda self: not self.scheduler.is_finished())
    @rule(drawn=st.lists(st.lists(TOKENS, min_size=6, max_size=6), min_size=1, max_size=8))
    def steps(self, drawn):
        """Up to eight steps, the sampled tokens of each drawn beforehand."""
        for token_ids in drawn:
            if not self.scheduler.is_finished():
                self.step(token_ids)

    @rule(
        what=st.sampled_from(["abort"] * 6 + ["abort nobody", "forget", "forget", "reset"]),
        pick=st.integers(0, 99),
    )
    def disturb(self, what, pick):
        """Cancel a request, or one that is not there, or forget the cache's contents, or all."""
        Operations.num_operations += 1
        if what == "forget":
            self.scheduler.block_manager.reset_prefix_cache()
            self.num_resets += 1
        elif what == "reset":
            self.scheduler.reset()
            self.num_resets += 1
            assert self.scheduler.is_finished() and all(s.is_finished for s in self.seqs.values())
            self.seqs.clear()
        elif what == "abort" and self.unfinished:
            seq = self.unfinished[pick % len(self.unfinished)]
            self.scheduler.abort(seq.seq_id)
            assert seq.finish_reason == "abort" and seq not in self.unfinished
        elif what == "abort nobody" and pick not in {seq.seq_id for seq in self.unfinished}:
            with pytest.raises(ValueError, match=str(pick)):
                self.scheduler.abort(pick)
        self.check_books()

    def teardown(self):
        if hasattr(self, "scheduler"):
            try:
                self.finish()
            finally:
                self.patch.undo()

    def finish(self):
        """What is left comes to its end, and in time: each step brings the oldest a token."""
        for _ in range(sum(s.num_prompt_tokens + s.params.max_tokens for s in self.unfinished)):
            if not self.scheduler.is_finished():
                self.step([0, 1, 0, 1, 1, 0])
        assert self.scheduler.is_finished() and all(seq.is_finished for seq in self.seqs.values())
        self.check_books()
        assert num_free(self.scheduler.block_manager) == self.num_blocks

    # ---- One step, and what must hold ----

    def step(self, token_ids: list[int]) -> None:
        """Schedule, compute, and account for the tokens that were drawn."""
        Operations.num_operations += 1
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        missing = {seq: seq.num_missing_tokens for seq in running}
        has_room = num_free(manager) >= sum(
            missing[seq] == 1 and len(seq) > len(seq.block_table) * self.size for seq in running
        )
        scheduled = scheduler.schedule()
        preempted = [seq for seq in running if seq not in scheduler.running]
        admitted = [seq for seq in scheduler.running if seq not in running]
        Operations.num_preemptions += len(preempted)
        Operations.num_hits += sum(seq.num_cached_tokens for seq in admitted)

        given = [seq.num_scheduled_tokens for seq in scheduled]
        assert len(set(scheduled)) == len(scheduled) and set(scheduled) <= set(scheduler.running)
        assert all(1 <= n <= s.num_missing_tokens for n, s in zip(given, scheduled))
        assert 1 <= sum(given) <= self.budget and len(scheduler.running) <= self.max_num_seqs
        assert [n > 1 for n in given] == sorted(n > 1 for n in given), "single tokens come first"
        assert scheduler.running[0] in scheduled, "the oldest always goes on"

        survivors = running[: len(running) - len(preempted)]
        assert preempted == running[len(survivors) :], "the youngest make room"
        assert not (preempted and has_room), "nobody had to make room"
        assert admitted == waiting[: len(admitted)] and not (admitted and preempted)
        for seq in survivors:
            if missing[seq] == 1 or admitted:  # it comes before all that has arrived later
                assert seq in scheduled and seq.num_scheduled_tokens == missing[seq]
        if scheduler.waiting and not preempted and sum(given) < self.budget:
            needed = manager.blocks_for(len(scheduler.waiting[0])) + self.num_blocks // 100
            assert num_free(manager) < needed or len(scheduler.running) == self.max_num_seqs, (
                "a request waits idly"
            )
        self.check_hits(admitted, survivors)

        self.compute(scheduled, admitted)
        self.account(scheduled, token_ids)
        self.check_books()

    def check_hits(self, admitted: list[Sequence], running: list[Sequence]) -> None:
        """What a running request has computed since the last reset is found by a new one."""
        for seq in admitted:
            self.resets_before[seq] = self.num_resets
            assert self.cached or seq.num_cached_tokens == 0
            for other in running:
                if self.cached and self.resets_before[other] == self.num_resets:
                    pairs = zip(self.text_names(seq), self.text_names(other))
                    common = sum(
                        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
                    )
                    common = min(common, other.num_computed_tokens)
                    assert seq.num_cached_tokens >= common // self.size * self.size

    def text_names(self, seq: Sequence) -> list[int]:
        """For each position the name of the text that ends there; equal texts, equal names."""
        found, name = [], -1
        for token_id in seq.token_ids:
            name = self.names.setdefault((name, token_id), len(self.names))
            found.append(name)
        return found

    def slots_of(self, seq: Sequence, start: int, stop: int) -> list[int]:
        """Where its tokens lie."""
        size, table = self.size, seq.block_table
        return [table[i // size] * size + i % size for i in range(start, stop)]

    def compute(self, scheduled: list[Sequence], admitted: list[Sequence]) -> None:
        """Write what the step computes; then all that is read must be there."""
        known = {seq: seq.num_computed_tokens for seq in self.scheduler.running}
        written = set()  # by now or by this step; what others compute in it may be read at once
        for seq, stop in known.items():
            written.update(self.slots_of(seq, 0, 0 if seq in admitted else stop))
        for seq in scheduled:
            start, known[seq] = known[seq], known[seq] + seq.num_scheduled_tokens
            start = max(start, seq.num_cached_tokens)
            names = self.text_names(seq)[start : known[seq]]
            for slot, name in zip(self.slots_of(seq, start, known[seq]), names):
                assert slot not in written, "two write into one slot"
                self.slots[slot] = name, self.num_resets
                written.add(slot)
        for seq, stop in known.items():
            names = self.text_names(seq)
            found = [self.slots[slot] for slot in self.slots_of(seq, 0, stop)]
            assert [name for name, _ in found] == names[:stop], "it reads another text"
            if seq in admitted:
                assert all(resets == self.num_resets for _, resets in found), "from before a reset"

    def account(self, scheduled: list[Sequence], token_ids: list[int]) -> None:
        """Those whose text is computed to its end gain a token, and perhaps finish by it."""
        before = {seq: list(seq.token_ids) for seq in scheduled}
        ends = [s for s in scheduled if s.num_scheduled_tokens == s.num_missing_tokens]
        assert account(self.scheduler, scheduled, token_ids[: len(scheduled)]) == ends
        for seq, token_id in zip(scheduled, token_ids):
            assert seq.token_ids == before[seq] + [token_id] * (seq in ends)
            if seq in ends:
                is_stopped = token_id == EOS and not seq.params.ignore_eos
                is_full = seq.num_completion_tokens == seq.params.max_tokens
                reason = "stop" if is_stopped else "length" if is_full else None
                assert (seq.finish_reason, seq.is_finished) == (reason, reason is not None)

    def check_books(self) -> None:
        """Ages in order, nothing lost, blocks only where a sequence runs."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len(running) <= self.max_num_seqs
        self.scheduler.block_manager.check_integrity(self.unfinished)
        ids = [seq.seq_id for seq in self.unfinished]
        assert ids == [i for i, seq in self.seqs.items() if not seq.is_finished], "out of order"
        assert all(seq.is_running and seq.num_missing_tokens >= 1 for seq in running)
        assert not any(seq.is_running or seq.num_computed_tokens for seq in waiting)
        assert not any(seq.block_table for seq in self.seqs.values() if not seq.is_running)


def test_random_operations(capsys):
    """Prefix hits and preemptions occur among them, or they would test little."""
    for number in itertools.count():
        run_state_machine_as_test(
            seed(number)(Operations),
            settings=settings(
                max_examples=300, stateful_step_count=50, suppress_health_check=list(HealthCheck)
            ),
        )
        if Operations.num_operations >= OPERATIONS:
            break
    if OPERATIONS:
        with capsys.disabled():
            print(
                f"\n{Operations.num_operations:,} operations, {Operations.num_hits:,} tokens found "
                f"in the cache, {Operations.num_preemptions:,} preemptions"
            )
    assert Operations.num_hits > 1000 and Operations.num_preemptions > 100

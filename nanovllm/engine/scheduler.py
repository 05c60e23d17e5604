"""Which requests run in the next step, and how many tokens each brings. Plain Python."""

from collections import deque
from time import perf_counter

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """Continuous batching: the batch is put together anew for every step.

    One law: each step gives every running sequence tokens until its `num_computed_tokens` catches
    up with its `num_tokens`, under a budget of tokens.
    """

    def __init__(self, config: Config, num_blocks: int, eos_token_ids: tuple[int, ...]):
        self.config = config
        self.num_blocks = num_blocks
        self.eos_token_ids = eos_token_ids
        self.max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.reset()

    def reset(self, error: BaseException | None = None) -> None:
        """Forget every request, whatever state `error` left it in: all blocks are free."""
        for seq in (*self.waiting, *self.running):
            if not seq.is_finished:
                seq.finish("abort", error)
        self.waiting, self.running = deque(), []
        self.block_manager = BlockManager(
            self.num_blocks, self.config.kvcache_block_size, self.config.enable_prefix_caching
        )
        self.num_preemptions = 0

    def is_finished(self) -> bool:
        """True when no request is left."""
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind the others."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with its `num_scheduled_tokens`.

        First come those that bring one token, then those that bring several. A request that runs
        never waits for one that arrives: decodes, then prompts that have begun, then new ones.
        """
        num_preemptions = self.num_preemptions
        singles = self.schedule_decodes()
        budget, chunks = self.config.max_num_batched_tokens - len(singles), []
        unfinished = [seq for seq in self.running if seq.num_missing_tokens > 1]
        while budget > 0:
            if unfinished:
                seq = unfinished.pop(0)
            elif num_preemptions == self.num_preemptions and self.can_admit():
                seq = self.admit()
            else:
                break
            self.schedule_tokens(seq, min(seq.num_missing_tokens, budget))
            budget -= seq.num_scheduled_tokens
            (chunks if seq.num_scheduled_tokens > 1 else singles).append(seq)
        return singles + chunks

    def schedule_tokens(self, seq: Sequence, num_tokens: int) -> None:
        """Let a sequence bring its next tokens; blocks that are known can be found."""
        seq.num_scheduled_tokens = num_tokens
        num_computed = seq.num_computed_tokens + num_tokens
        self.block_manager.cache_blocks(seq, min(num_computed, seq.num_known_tokens))

    def schedule_decodes(self) -> list[Sequence]:
        """One token for each sequence that lacks one, oldest first; the youngest make room."""
        decodes = []
        for seq in list(self.running):
            if seq.num_missing_tokens != 1:
                continue  # it brings a chunk, or waits for its last token
            while seq.is_running and not self.block_manager.can_append(seq):
                self.preempt()
            if not seq.is_running:
                break  # it was the youngest left
            self.block_manager.may_append(seq)
            self.schedule_tokens(seq, 1)
            decodes.append(seq)
        return decodes

    def preempt(self) -> None:
        """Take its blocks from the youngest; it goes on later, from what is then in the cache."""
        seq = self.running.pop()
        self.block_manager.deallocate(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(seq)

    def can_admit(self) -> bool:
        """May the request at the head of the queue start, with blocks for all that it holds?"""
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        # What runs will grow: a part of the pool is left for it, so that it need not preempt soon.
        reserve = self.num_blocks // 100 if self.running else 0
        return self.block_manager.can_allocate(self.waiting[0], reserve)

    def admit(self) -> Sequence:
        """Start the request at the head of the queue."""
        seq = self.waiting.popleft()
        self.block_manager.allocate(seq)
        if seq.num_preemptions == 0:
            seq.num_hit_tokens = seq.num_cached_tokens
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        return seq

    def postprocess(self, seqs: list[Sequence], token_ids: list[int | None]) -> list[Sequence]:
        """Hand out a step's tokens; returns the sequences that gained one by it, or ended."""
        now, grown = perf_counter(), []
        for seq, token_id in zip(seqs, token_ids, strict=True):
            if token_id is not None:
                seq.note_time(now)
                seq.receive(token_id, self.eos_token_ids)
                known = min(seq.num_computed_tokens, seq.num_known_tokens)
                self.block_manager.cache_blocks(seq, known)
                grown.append(seq)
        for seq in grown:
            if seq.is_finished:
                self.block_manager.deallocate(seq)
                if seq in self.waiting:  # preempted while its last token was on the way
                    self.waiting.remove(seq)
        self.running = [seq for seq in self.running if not seq.is_finished]
        return grown

    def abort(self, seq_id: int) -> None:
        """Drop an unfinished request; ValueError for an id that is not here."""
        for queue in (self.waiting, self.running):
            for seq in queue:
                if seq.seq_id == seq_id:
                    seq.finish("abort")
                    self.block_manager.deallocate(seq)
                    queue.remove(seq)
                    return
        raise ValueError(f"request {seq_id} is not in the engine")

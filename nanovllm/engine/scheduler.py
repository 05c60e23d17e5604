"""Which requests run in the next step, and how many tokens each brings. Plain Python."""

from collections import deque
from time import perf_counter

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """Continuous batching: the batch is put together anew for every step.

    One law: each step gives every running sequence tokens until its `num_computed_tokens` catches
    up with its `num_tokens`, under a budget of tokens. The policy:

    - Sequences that lack one token get it first: decodes. Then a prompt that has begun gets what
      it lacks, then new requests are admitted. What does not fit into the budget comes later.
    - First come, first served: only the head of the queue is admitted, while fewer than
      `max_num_seqs` run, and when there are blocks for all tokens that it has now, and a few to
      spare. Nothing is set aside for what it will generate.
    - When a decode needs a block and none is free, the youngest running sequence is preempted: it
      gives back all its blocks, waits at the head of the queue, and computes its tokens again.
      Nobody is admitted in such a step.

    The oldest is never preempted while another runs, and alone it fits into the cache: requests
    that do not are refused when they arrive. So the oldest always ends, and all have their turn.
    """

    def __init__(self, config: Config, num_blocks: int, eos_token_ids: tuple[int, ...]):
        self.config = config
        self.num_blocks = num_blocks
        self.eos_token_ids = eos_token_ids
        # Each running sequence may bring one token, and all of them must fit into the budget.
        self.max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.waiting: deque[Sequence] = deque()  # those that were preempted stand at its head
        self.running: list[Sequence] = []  # in the order of admission: oldest first
        self.reset()  # makes the block manager

    def add(self, seq: Sequence) -> None:
        """Queue a sequence behind the others."""
        self.waiting.append(seq)

    def is_finished(self) -> bool:
        """True when no request is left."""
        return not self.waiting and not self.running

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with its `num_scheduled_tokens`.

        The budget goes to decodes, then to prompts that have begun, then to new ones: a request
        that runs never waits for one that arrives. In the result, those that bring one token come
        first, then those that bring several.
        """
        preemptions_before = self.num_preemptions
        singles = self.schedule_decodes()
        budget = self.config.max_num_batched_tokens - len(singles)
        chunks: list[Sequence] = []
        unfinished = [seq for seq in self.running if seq.num_missing_tokens > 1]
        while budget > 0:
            if unfinished:
                seq = unfinished.pop(0)
            elif self.num_preemptions == preemptions_before and self.can_admit():
                seq = self.admit()
            else:
                break
            self.schedule_tokens(seq, min(seq.num_missing_tokens, budget))
            budget -= seq.num_scheduled_tokens
            (chunks if seq.num_scheduled_tokens > 1 else singles).append(seq)
        return singles + chunks

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
        """Take all blocks from the youngest running sequence; it waits at the head of the queue.

        It keeps its tokens. They are computed again when it is admitted again, except those that
        the prefix cache still has.
        """
        seq = self.running.pop()
        self.block_manager.deallocate(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed_tokens = 0
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(seq)

    def can_admit(self) -> bool:
        """May the head of the queue start? It needs a place, and blocks for all that it has now.

        A hundredth of the pool is left to those that run: they grow, and would soon preempt it.
        """
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        if self.waiting[0].num_missing_tokens == 0:
            return False  # it was preempted, and waits for a token before it can go on
        reserve = self.num_blocks // 100 if self.running else 0
        return self.block_manager.can_allocate(self.waiting[0], reserve)

    def admit(self) -> Sequence:
        """Start the head of the queue: it gets its blocks, and is the youngest that runs."""
        seq = self.waiting.popleft()
        self.block_manager.allocate(seq)
        if seq.num_preemptions == 0:
            seq.num_hit_tokens = seq.num_cached_tokens
        seq.status = SequenceStatus.RUNNING
        self.running.append(seq)
        return seq

    def schedule_tokens(self, seq: Sequence, num_tokens: int) -> None:
        """Let a sequence bring its next tokens; a block is found once all its tokens are known."""
        seq.num_scheduled_tokens = num_tokens
        num_computed = seq.num_computed_tokens + num_tokens
        self.block_manager.cache_blocks(seq, min(num_computed, seq.num_known_tokens))

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

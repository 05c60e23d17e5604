"""The exercises of chapters 3 to 5, as checks."""

from __future__ import annotations

from checks import Wrong, counted, exercise, near, order_of_ends, steps

# ---- Chapter 3 ----


@exercise
def block_modulo(idle: float, at_end: float) -> None:
    """Steps with a block that is not needed yet, and blocks in the last step."""
    script = """
from nanovllm.engine.block_manager import BlockManager

def may_append(self, seq):
    if len(seq) % self.block_size == 0:
        seq.block_table.append(self.free_block_ids.popleft())

def watched(seqs):
    needed = llm.block_manager.blocks_for(len(seqs[0]))
    steps.append((len(seqs[0].block_table), needed))
    return run(seqs)

BlockManager.may_append = may_append
llm, steps = LLM(device="cpu", kvcache_block_size=4, num_kvcache_blocks=8), []
run, llm.model_runner.run = llm.model_runner.run, watched
llm.generate([7, 8, 9], asked(10), use_tqdm=False)
print(json.dumps([sum(held > needed for held, needed in steps), steps[-1][0]]))
"""
    early, owned = counted(3, script)
    near("idle", idle, early, "at 4 tokens it takes a block that the fifth token needs", 0)
    near("at_end", at_end, owned, "in the last step 12 tokens need a slot", 0)


@exercise
def block_size(with_16: float, with_256: float, bytes_16: float, bytes_256: float) -> None:
    """Sequences that are alive, and bytes of their tables."""
    hint = "40 GB are 348,800 slots, and a sequence holds its 700 and half a block"
    near("with_16", with_16, 493, hint)
    near("with_256", with_256, 421, hint)
    near("bytes_16", bytes_16, 493 * 44.25 * 4, "some 44 blocks a sequence, 4 bytes each")
    near("bytes_256", bytes_256, 421 * 3.1 * 4, "some three blocks a sequence, 4 bytes each", 0.08)


@exercise
def free_list() -> None:
    """A manager that hands out the block that was freed last."""
    from nanovllm import SamplingParams
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.sequence import Sequence

    manager = BlockManager(8, 4)
    first, second, third = (Sequence(i, [1] * 6, SamplingParams(), seed=0) for i in range(3))
    manager.allocate(first)
    manager.allocate(second)
    freed = list(first.block_table)
    manager.deallocate(first)
    manager.allocate(third)
    manager.check_integrity([second, third])
    if sorted(third.block_table) != sorted(freed):
        raise Wrong(f"{freed} were freed last, and {third.block_table} are handed out")
    third.token_ids += [1, 1, 1]
    freed = list(second.block_table)
    manager.deallocate(second)
    manager.may_append(third)
    if third.block_table[-1] not in freed:
        raise Wrong(f"{freed} were freed last, and a text grows into {third.block_table[-1]}")


# ---- Chapter 4 ----


@exercise
def common_prompt(share_16: float, share_256: float) -> None:
    """Shares of the prompt tokens that are found, from 0 to 1."""
    near("share_16", share_16, 0.72, "18 whole blocks of 16 fit into 300 tokens")
    near("share_256", share_256, 0.64, "one whole block of 256 fits into 300 tokens")


@exercise
def release_order(found: float) -> None:
    """Blocks that the second request for the first text finds."""
    near("found", found, 0, "the first block of the text is the first to be overwritten", 0)


@exercise
def trust_the_hash(found: float, blocks: float) -> None:
    """Tokens of the second prompt that are found, and different blocks that they are read from."""
    script = """
from nanovllm.engine.block_manager import BlockManager

def find(self, parent, token_ids):
    return 7, next(iter(self.prefixes.get(7, [])), None)

BlockManager.find = find
llm = LLM(device="cpu", kvcache_block_size=4, num_kvcache_blocks=40)
llm.generate(list(range(16)), asked(1), use_tqdm=False)
seq = llm.make_sequence(list(range(100, 120)), asked(1))
llm.block_manager.allocate(seq)
print(json.dumps([seq.num_cached_tokens, len(set(seq.block_table))]))
"""
    cached, different = counted(4, script)
    near("found", found, cached, "whatever is looked up is taken for what was stored first", 0)
    near("blocks", blocks, different, "allocate takes the copy that somebody already uses", 0)


@exercise
def hits_first() -> None:
    """An engine whose batches begin with the requests of which most is in the cache."""
    from nanovllm import LLM, SamplingParams

    llm = LLM(device="cpu", max_num_seqs=1, kvcache_block_size=4, num_kvcache_blocks=60)
    params, orders = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), []
    known, other = list(range(12)), list(range(50, 62))
    try:
        for prompts in ([known], [other, [9, *other], known[:7], known]):
            ids = [llm.add_request(prompt, params) for prompt in prompts]
            ends = (seq.seq_id for seqs in steps(llm) for seq in seqs if seq.is_finished)
            orders.append([ids.index(seq_id) for seq_id in ends])
    finally:
        llm.exit()
    if orders[1] != [3, 2, 0, 1]:
        raise Wrong(
            f"12, 4, 0 and 0 tokens are known of requests 3, 2, 0 and 1: first come those, and of "
            f"equals who came first; they ended in this order: {orders[1]}"
        )


# ---- Chapter 5 ----


@exercise
def oldest_first(ends_first: float, ended: float) -> None:
    """Of request 0, which came first, and request 1; and how many of another two come to an end."""
    script = """
from nanovllm.engine.scheduler import Scheduler, SequenceStatus

def preempt(self):
    seq = self.running[0]
    self.running.remove(seq)
    self.block_manager.deallocate(seq)
    seq.status, seq.num_computed_tokens = SequenceStatus.WAITING, 0
    self.waiting.appendleft(seq)

def ends(lengths, num_tokens):
    options = dict(kvcache_block_size=4, num_kvcache_blocks=4, enable_prefix_caching=False)
    llm, ended = LLM(device="cpu", **options), []
    ids = [llm.add_request([5] * length, asked(num_tokens)) for length in lengths]
    try:
        while not llm.is_finished():
            ended += [ids.index(seq.seq_id) for seq in llm.step() if seq.is_finished]
    except RuntimeError:  # it could schedule nobody
        pass
    return ended

Scheduler.preempt = preempt
print(json.dumps([ends([1, 3], 8)[0], len(ends([1, 1], 10))]))
"""
    first, come = counted(5, script)
    hint = "where request 1 needs a block, request 0 gives all of its own"
    near("ends_first", ends_first, first, hint, 0)
    near("ended", ended, come, "the oldest preempts itself, and nobody is left to run", 0)


@exercise
def decode_first(steps: float, tokens: float, turned_steps: float, turned_tokens: float) -> None:
    """Steps until a long prompt is run, and tokens that two others get meanwhile."""
    script = """
from nanovllm.config import Config
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

scheduler = Scheduler(Config(kvcache_block_size=4, max_num_batched_tokens=16), 100, ())
two, long = [Sequence(i, [i], asked(50), 0) for i in range(2)], Sequence(2, [5] * 60, asked(1), 0)
counts = []
for seqs in (two, [long]):
    for seq in seqs:
        scheduler.add(seq)
    counts.append(0)
    while not seqs[0].num_completion_tokens:
        planned = scheduler.schedule()
        scheduler.postprocess(planned, [0] * len(planned))
        counts[-1] += 1
print(json.dumps([counts[1], sum(seq.num_completion_tokens - 1 for seq in two)]))
"""
    ran, got = counted(5, script)
    near("steps", steps, ran, "the two take 2 of the 16 tokens of each step", 0)
    near("tokens", tokens, got, "each of the two gets one token a step", 0)
    hint = "the prompt takes whole steps, and leaves 4 tokens of the last one"
    near("turned_steps", turned_steps, 4, hint, 0)
    near("turned_tokens", turned_tokens, 2, hint, 0)


@exercise
def shortest_first() -> None:
    """An engine that admits the shortest prompt that waits."""
    ended = order_of_ends([(9, 2), (30, 2), (4, 2), (12, 2)], max_num_seqs=1)
    if ended not in ([2, 0, 3, 1], [0, 2, 3, 1]):  # or the first had begun
        raise Wrong(f"prompts of 9, 30, 4 and 12 tokens ended in this order: {ended}")
    ended = order_of_ends([(4, 2), (2, 2), (2, 2), (2, 2)], max_num_seqs=1)
    if ended not in ([1, 2, 3, 0], [0, 1, 2, 3]):
        raise Wrong(f"prompts of 4, 2, 2 and 2 tokens ended in this order: {ended}")
    if admitted_next([12], preempt=True) != [0]:
        raise Wrong("a request that was preempted is not the next one that runs")
    if 2 not in (found := admitted_next([6, 12], preempt=False)):
        raise Wrong(f"a short prompt for which there is room stays outside: {found} run")


def admitted_next(lengths: list[int], preempt: bool) -> list[int]:
    """Who is in the step in which a prompt of one token comes behind others, in 4 blocks of 4.

    The first has begun before, and may have been preempted.
    """
    from nanovllm import SamplingParams
    from nanovllm.config import Config
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence

    scheduler = Scheduler(Config(kvcache_block_size=4, max_num_seqs=1 + (not preempt)), 4, ())
    first, *others = (
        Sequence(i, [5 + i] * length, SamplingParams(ignore_eos=True), 0)
        for i, length in enumerate([*lengths, 1])
    )
    scheduler.add(first)
    planned = scheduler.schedule()
    if preempt:
        scheduler.preempt()
    else:
        scheduler.postprocess(planned, [7])
    for seq in others:
        scheduler.add(seq)
    return [seq.seq_id for seq in scheduler.schedule()]

"""How the tests reach an engine's blocks and queues, whichever stage owns them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from device import build, offered

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

NO_PREFIX_CACHE = offered(enable_prefix_caching=False)
# in place of BlockManager.compute_hash: hashes that collide
HASHES = {"one value": lambda *_: 7, "two values": lambda token_ids, *_: sum(token_ids) % 2}


@contextmanager
def engine(kvcache_block_size: int = 256, **options) -> Iterator[LLM]:
    """An engine on the bundled model; it must be empty at the end.

    Its pool holds 8192 tokens unless `num_kvcache_blocks` says otherwise.
    """
    options = {"num_kvcache_blocks": -(-8192 // kvcache_block_size), **options}
    llm = build(dtype="float32", kvcache_block_size=kvcache_block_size, **options)
    yield llm
    check_empty(llm)
    llm.exit()


def queues(llm: LLM):
    """The object with `waiting`, `running` and `block_manager`: the engine or its scheduler."""
    return getattr(llm, "scheduler", llm)


def block_manager(llm: LLM) -> BlockManager:
    """The engine's block manager."""
    return queues(llm).block_manager


def hit_rate(manager: BlockManager) -> float:
    """The share of the admitted tokens that were found in the cache."""
    return manager.num_hit_tokens / max(manager.num_queried_tokens, 1)


def num_free(manager: BlockManager) -> int:
    """How many blocks nobody owns."""
    return len(free_ids(manager))


def free_ids(manager: BlockManager) -> list[int]:
    """The blocks that nobody owns, in the order in which they will be taken."""
    name = "free_blocks" if hasattr(manager, "free_blocks") else "free_block_ids"
    return list(getattr(manager, name))


def unfinished(llm: LLM) -> list[Sequence]:
    """The engine's sequences, running and waiting."""
    return [*queues(llm).running, *queues(llm).waiting]


def check_books(llm: LLM) -> None:
    """The block manager's books agree with the tables; no waiting sequence owns a block."""
    block_manager(llm).check_integrity(unfinished(llm))
    assert not any(seq.block_table for seq in queues(llm).waiting)


def check_empty(llm: LLM) -> None:
    """No request is left, and every block is free."""
    assert llm.is_finished() and unfinished(llm) == []
    check_books(llm)
    assert sorted(free_ids(block_manager(llm))) == list(range(block_manager(llm).num_blocks))


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy, to the last token."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def varied(max_tokens: tuple[int, ...]) -> list[SamplingParams]:
    """For each number of tokens a request: greedy, seeded, seeded with a nucleus, greedy, …"""
    styles = dict(temperature=0), dict(temperature=0.8), dict(temperature=1.5, top_p=0.9)
    return [
        SamplingParams(**styles[i % 3], seed=i, max_tokens=number, ignore_eos=True)
        for i, number in enumerate(max_tokens)
    ]


def alone(prompts, params) -> list[list[int]]:
    """The tokens that each request gets without the prefix cache, when nothing else runs."""
    with engine(**NO_PREFIX_CACHE) as llm:
        return [tokens(llm, *request)[0] for request in zip(prompts, params, strict=True)]


def smallest_pool(block_size: int, prompts, params) -> dict:
    """Options for the fewest blocks that hold the longest request."""
    longest = max(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
    return dict(kvcache_block_size=block_size, num_kvcache_blocks=-(-longest // block_size))


def make_seq(token_ids, max_tokens: int = 8, seq_id: int = 0) -> Sequence:
    """A request that no engine has seen."""
    return Sequence(seq_id, list(token_ids), greedy(max_tokens), seed=0)


def tokens(llm: LLM, prompts, params) -> list[list[int]]:
    """The tokens of each prompt; the engine's books are right before and after."""
    check_empty(llm)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    check_empty(llm)
    return [out["token_ids"] for out in outputs]


def run_lengths(llm: LLM, monkeypatch) -> list[int]:
    """The number of tokens of every run of the model from now on."""
    lengths, model = [], llm.model_runner.model
    forward = model.forward

    def counting(input_ids, *args):
        lengths.append(len(input_ids))
        return forward(input_ids, *args)

    monkeypatch.setattr(model, "forward", counting)
    return lengths


def add_all(llm: LLM, prompts, params) -> list[int]:
    """Queue the requests; returns their ids."""
    return [llm.add_request(*request) for request in zip(prompts, params, strict=True)]


def step_through(llm: LLM, prompts=(), params=(), after_step=check_books) -> list[list[int]]:
    """Queue these requests and step until none is left; `after_step(llm)` follows each step.

    Returns the tokens of all requests that have finished, in the order of their ids.
    """
    add_all(llm, prompts, params)
    found = {}
    while not llm.is_finished():
        found |= {seq.seq_id: seq for seq in llm.step()}
        after_step(llm)
    check_empty(llm)
    return [found[seq_id].completion_token_ids for seq_id in sorted(found)]


def admit(manager: BlockManager, *seqs: Sequence) -> None:
    """Give new sequences their blocks, one after another, and let others find what these hold."""
    for seq in seqs:
        manager.allocate(seq)
        manager.cache_blocks(seq, len(seq))


def append(seq: Sequence, token_id: int) -> None:
    """Append a token that has been sampled, which a step expects from chapter 9 on."""
    if hasattr(seq, "expect_token"):
        seq.expect_token(0)
    seq.append_token(token_id)


def grow(manager: BlockManager, seq: Sequence, *token_ids: int) -> None:
    """Append tokens to a sequence that has blocks, as steps would."""
    for token_id in token_ids:
        append(seq, token_id)
        manager.may_append(seq)
        manager.cache_blocks(seq, len(seq))


def hits(manager: BlockManager, token_ids) -> int:
    """How many tokens of a text are in the cache; the cache is left as it was."""
    return len(manager.match(make_seq(token_ids))) * manager.block_size


class Sampled:
    """A step's result that is there."""

    def __init__(self, token_ids: list[int]):
        self.numbers = token_ids

    def token_ids(self) -> list[int]:
        return self.numbers

    def told(self, token_ids: list[int]) -> tuple:
        return ()


def account(scheduler, seqs: list, token_ids: list[int]) -> list:
    """What follows a step that has run: the scheduler is told, through the pipeline if any."""
    if importlib.util.find_spec("nanovllm.engine.pipeline") is None:
        return scheduler.postprocess(seqs, token_ids)
    pipeline = importlib.import_module("nanovllm.engine.pipeline").Pipeline()
    pipeline.push(seqs, Sampled(token_ids))
    return scheduler.postprocess(*pipeline.pop())

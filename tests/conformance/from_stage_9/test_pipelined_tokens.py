"""A step is launched before the one in front of it has been read: no token depends on it."""

from __future__ import annotations

import os
from functools import cache
from itertools import count, product, zip_longest
from random import Random

import pytest
from checkpoints import random_prompts
from in_flight import check_done, check_in_flight, pipelined, result, serve
from memory import NO_PREFIX_CACHE, block_manager, engine, greedy, hits, num_free, unfinished

from nanovllm import SamplingParams
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.scheduler import Scheduler

HELLO = [{"role": "user", "content": "Hello"}]
ONE_BY_ONE = dict(async_scheduling=False, **NO_PREFIX_CACHE)


@pytest.fixture(autouse=True)
def no_placeholder_becomes_text(monkeypatch):
    append = Detokenizer.append

    def checked(self, token_id):
        assert token_id >= 0
        append(self, token_id)

    monkeypatch.setattr(Detokenizer, "append", checked)


@cache
def requests() -> tuple[list, list, list]:
    """Prompts and parameters that end in every way, and what they get one step after the other.

    A stop token is one that the request would have generated; those that end by an end-of-sequence
    token are answers of the bundled model.
    """
    shared, *tails = random_prompts((12, 1, 3, 9, 20), 1536, seed=50)
    prompts, params = [], []
    with engine(**ONE_BY_ONE) as llm:
        story = llm.tokenizer.encode("Once upon a time")
        chat = llm.apply_chat_template(HELLO)
        texts = [shared, *(shared + t for t in tails[:3]), tails[3], story, story, chat, tails[0]]
        styles = [
            dict(temperature=0),
            dict(temperature=0.9),
            dict(temperature=1.0, top_k=30),
            dict(temperature=1.4, top_p=0.9),
            dict(temperature=1.2, top_p=0.95, top_k=100),
        ]
        for number, prompt in enumerate(texts * 2):
            style = dict(styles[number % 5], seed=number, max_tokens=12, ignore_eos=True)
            (free,) = llm.generate([prompt], SamplingParams(**style), use_tqdm=False)
            ids, text = free["token_ids"], free["text"]
            kind = number % 6
            if kind == 1:
                style |= dict(max_tokens=1)
            elif kind in (2, 3):
                style |= dict(stop_token_ids=[ids[kind * 3]])
            elif kind == 4:
                style |= dict(stop=[text[len(text) // 2 :][:3] or "x", "never"])
            prompts.append(prompt)
            params.append(SamplingParams(**style))
        for number in range(3):  # which end by an end-of-sequence token
            prompts.append(chat)
            params.append(SamplingParams(temperature=number * 0.2, seed=number, max_tokens=60))
        expected = [serve(llm, [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    reasons = [out["finish_reason"] for out in expected]
    assert reasons.count("stop") > 8 and reasons.count("length") > 5 and "stop" in reasons[-3:]
    return prompts, params, expected


def smallest(block_size: int) -> int:
    """The fewest blocks that hold the longest request."""
    prompts, params, _ = requests()
    longest = max(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
    return -(-longest // block_size)


SETTINGS = list(
    product(
        (1, 4, 16),  # tokens in a block
        (1, 7, 16384),  # tokens in a step
        (2, 512),  # sequences that run at once
        ("smallest", "tight", "roomy"),  # pool
        (True, False),  # prefix cache
    )
)
if not os.environ.get("NANOVLLM_OPERATIONS"):
    SETTINGS = Random(807).sample(SETTINGS, 8)


@pytest.mark.parametrize(("block_size", "budget", "max_num_seqs", "pool", "cached"), SETTINGS)
def test_tokens_are_those_of_one_step_after_the_other(
    block_size, budget, max_num_seqs, pool, cached
):
    """Twice: what the first round leaves in the cache is found by the second."""
    every = 3 if budget == 1 else 1  # a step for each token of a prompt takes long
    prompts, params, expected = (column[::every] for column in requests())
    num_blocks = smallest(block_size) * {"smallest": 1, "tight": 2, "roomy": 12}[pool]
    with pipelined(
        kvcache_block_size=block_size,
        num_kvcache_blocks=num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=cached,
    ) as llm:
        for order in (slice(None), slice(None, None, -1)):
            assert serve(llm, prompts[order], params[order]) == expected[order]


def test_two_steps_are_in_flight():
    """Or the tests above would show little; without the option it is one."""
    for asynchronous in (True, False):
        with engine(async_scheduling=asynchronous) as llm:
            llm.add_request([5], greedy(9))
            llm.step()
            (seq,) = unfinished(llm)
            assert len(llm.pipeline) == seq.num_pending_tokens == asynchronous
            assert seq.num_completion_tokens == 1 and len(seq.completion_token_ids) == 1
            llm.abort(seq.seq_id)


def test_generate_gives_the_same():
    prompts, params, expected = requests()
    with pipelined() as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_done(llm)
    for out in outputs:
        out.pop("metrics")
    assert outputs == expected


def test_interleaved_streams_join_to_what_generate_returns():
    """All at once, one piece each in turn; no piece shows a placeholder."""
    prompts, params, expected = requests()
    with pipelined(kvcache_block_size=4, num_kvcache_blocks=60) as llm:
        streams = [llm.stream(*request) for request in zip(prompts, params, strict=True)]
        for pieces, whole in zip(zip(*zip_longest(*streams)), expected, strict=True):
            pieces = [piece for piece in pieces if piece is not None]
            ids = [token_id for piece in pieces for token_id in piece["token_ids"]]
            assert ids == whole["token_ids"]
            assert "".join(piece["text"] for piece in pieces) == whole["text"]
            reasons = [piece["finish_reason"] for piece in pieces]
            assert reasons == [None] * (len(pieces) - 1) + [whole["finish_reason"]]
        check_done(llm)


def test_requests_may_come_while_a_step_is_in_flight():
    prompts, params, expected = requests()
    with pipelined(kvcache_block_size=4, num_kvcache_blocks=60) as llm:
        seqs = []
        for request in zip(prompts, params, strict=True):
            seqs.append(llm.add(llm.make_sequence(*request)))
            llm.step()
            check_in_flight(llm)
        serve(llm, [], [])
        assert [result(llm, seq) for seq in seqs] == expected


@pytest.mark.parametrize("every", [1, 3])
def test_a_reset_of_the_cache_in_flight_changes_no_token(every):
    prompts, params, expected = requests()
    steps = count(1)

    def now_and_then(llm):
        if next(steps) % every == 0:
            llm.reset_prefix_cache()
            assert not block_manager(llm).prefixes
            check_in_flight(llm)

    with pipelined(kvcache_block_size=4, num_kvcache_blocks=40) as llm:
        assert serve(llm, prompts, params, now_and_then) == expected


def test_what_an_ended_request_leaves_in_the_cache_is_right():
    """Turns of a conversation, each ended by a stop token while the next step was running."""
    (prompt,) = random_prompts((9,), 1536, seed=51)
    with engine(**ONE_BY_ONE) as plain, pipelined(kvcache_block_size=2) as llm:
        for turn in range(6):
            free = serve(plain, [prompt], [greedy(9)])[0]["token_ids"]
            asked = SamplingParams(
                temperature=0, max_tokens=30, stop_token_ids=[free[turn]], ignore_eos=True
            )
            (out,) = serve(plain, [prompt], [asked])
            assert serve(llm, [prompt], [asked]) == [out]
            prompt = prompt + out["token_ids"]
            assert hits(block_manager(llm), prompt) >= (len(prompt) - 1) // 2 * 2
            prompt = prompt + [turn, 77]


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_what_a_request_has_computed_is_found_to_its_last_block(block_size):
    """While it runs up to what has been read, and at its end all but its last token."""
    (prompt,) = random_prompts((7,), 1536, seed=54)
    with pipelined(kvcache_block_size=block_size) as llm:
        seq = llm.add(llm.make_sequence(prompt, greedy(16)))
        while not seq.is_finished:
            llm.step()
            known = min(seq.num_known_tokens, seq.num_computed_tokens)
            assert (
                hits(block_manager(llm), seq.token_ids[:known]) == known // block_size * block_size
            )
        assert hits(block_manager(llm), seq.token_ids) == 22 // block_size * block_size


# ---- Pools in which blocks change hands at once ----


@cache
def stopping() -> tuple[list, list, list]:
    """Many short requests that end by a stop token, at a place that no one knows beforehand."""
    random, prompts = Random(1), random_prompts((6,) * 40, 1536, seed=52)
    params = []
    with engine(**ONE_BY_ONE) as llm:
        free = llm.generate(prompts, greedy(12), use_tqdm=False)
        for out in free:
            stops = [random.choice(out["token_ids"])]
            params.append(
                SamplingParams(temperature=0, max_tokens=12, stop_token_ids=stops, ignore_eos=True)
            )
        return prompts, params, serve(llm, prompts, params)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 18), (3, 7), (18, 2)])
def test_a_step_for_a_request_that_has_ended_harms_nobody(block_size, num_blocks, cached):
    """Its blocks belong to others before it is over."""
    prompts, params, expected = stopping()
    with pipelined(
        kvcache_block_size=block_size, num_kvcache_blocks=num_blocks, enable_prefix_caching=cached
    ) as llm:
        assert serve(llm, prompts, params) == expected
        llm.model_runner.kv_cache.fill_(1e4)
        llm.reset_prefix_cache()
        assert serve(llm, prompts[::-1], params[::-1]) == expected[::-1]


def test_the_blocks_of_an_ended_request_are_free_at_once():
    """The next request starts in the very next step, in the whole pool."""
    prompts, params, expected = stopping()
    number = next(i for i, out in enumerate(expected) if 2 < len(out["token_ids"]) < 12)
    with pipelined(kvcache_block_size=18, num_kvcache_blocks=1) as llm:
        first, second = (
            llm.add(llm.make_sequence(prompts[i], params[i])) for i in (number, (number + 1) % 40)
        )
        while not first.is_finished:
            llm.step()
        (overrun,) = llm.pipeline.steps
        assert overrun.seqs == [first] and num_free(block_manager(llm)) == 1
        assert min(first.token_ids) >= 0 and first.num_pending_tokens == 0
        assert llm.step() == [] and second.is_running, "the overrun is dropped, the next runs"
        assert llm.step() == [second]
        serve(llm, [], [])
        assert [result(llm, first), result(llm, second)] == [
            expected[number],
            expected[(number + 1) % 40],
        ]


@pytest.mark.parametrize("ended_by", ["length", "stop"])
def test_a_request_may_end_after_it_has_been_preempted(monkeypatch, ended_by):
    """Its last token was on the way when it lost its blocks; it needs none of them any more."""
    victims, preempt = [], Scheduler.preempt

    def watched(self):
        victims.append(self.running[-1])
        preempt(self)

    monkeypatch.setattr(Scheduler, "preempt", watched)
    prompts, num_ended = random_prompts((5, 4), 1536, seed=53), 0
    for length, num_blocks in product((7, 8, 9), (25, 26)):
        params = [greedy(20), greedy(length)]
        with engine(**ONE_BY_ONE) as plain:
            expected = serve(plain, prompts, params)
            if ended_by == "stop":
                stops = expected[1]["token_ids"][-1:]
                params[1] = SamplingParams(
                    temperature=0, max_tokens=20, stop_token_ids=stops, ignore_eos=True
                )
                expected = serve(plain, prompts, params)

        def look(llm):
            nonlocal num_ended
            num_ended += sum(seq.is_finished for seq in victims)
            victims.clear()

        with pipelined(kvcache_block_size=1, num_kvcache_blocks=num_blocks) as llm:
            assert serve(llm, prompts, params, look) == expected
    assert num_ended > 0

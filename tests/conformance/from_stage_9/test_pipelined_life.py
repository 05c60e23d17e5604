"""With a step in flight, requests are cancelled, engines interrupted, and steps counted."""

from __future__ import annotations

from functools import cache
from itertools import count

import pytest
from checkpoints import random_prompts
from in_flight import check_done, check_in_flight, count_runs, pipelined, result, serve
from memory import add_all, block_manager, engine, greedy, num_free, unfinished, varied

from nanovllm import SamplingParams
from nanovllm.engine.model_runner import ModelRunner, Result
from nanovllm.engine.sequence import Sequence

PROMPTS = random_prompts((9, 30, 9, 21), 1536, seed=60)
PARAMS = varied((24, 18, 24, 5))
CROWDED = dict(kvcache_block_size=4, num_kvcache_blocks=16, max_num_batched_tokens=12)


@cache
def expected() -> list[dict]:
    """What the requests get one step after the other."""
    with engine(async_scheduling=False) as llm:
        return [serve(llm, [p], [q])[0] for p, q in zip(PROMPTS, PARAMS, strict=True)]


def test_the_option_says_how_many_steps_are_in_flight():
    for value, number in ((True, 2), (False, 1)):
        with engine(async_scheduling=value) as llm:
            assert llm.config.max_in_flight == number
    for value in ("yes", 2, 0):
        with pytest.raises(ValueError, match=f"async_scheduling.*{value}"):
            engine(async_scheduling=value).__enter__()


# ---- Cancelling ----


@pytest.mark.parametrize("pick", range(4))
@pytest.mark.parametrize("num_steps", [1, 2, 5, 13, 34])
def test_a_request_is_cancelled_with_a_token_on_the_way(num_steps, pick):
    """It is gone at once, with its blocks and its placeholder; the others get their tokens."""
    with pipelined(**CROWDED) as llm:
        seqs = [llm.add(llm.make_sequence(*request)) for request in zip(PROMPTS, PARAMS)]
        for _ in range(num_steps):
            llm.step()
        left = unfinished(llm)
        seq = left[pick % len(left)]
        num_tokens = seq.num_completion_tokens
        owned = sum(block_manager(llm).blocks[i].ref_count == 1 for i in seq.block_table)
        free = num_free(block_manager(llm))
        llm.abort(seq.seq_id)
        check_in_flight(llm)
        assert num_free(block_manager(llm)) == free + owned and not seq.block_table
        assert (seq.finish_reason, seq.num_completion_tokens) == ("abort", num_tokens)
        assert min(seq.token_ids) >= 0 and seq not in unfinished(llm)
        with pytest.raises(ValueError, match=str(seq.seq_id)):
            llm.abort(seq.seq_id)
        number, length = seqs.index(seq), len(seq)
        while not llm.is_finished():
            assert seq not in llm.step()
            check_in_flight(llm)
        assert len(seq) == length, "the token that was on the way is dropped"
        assert result(llm, seq)["token_ids"] == expected()[number]["token_ids"][:num_tokens]
        for other in range(4):
            if other != number:
                assert result(llm, seqs[other]) == expected()[other]
        check_done(llm)


@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_all_are_cancelled_with_a_step_in_flight(num_steps):
    with pipelined(**CROWDED) as llm:
        add_all(llm, PROMPTS, PARAMS)
        for _ in range(num_steps):
            llm.step()
        for seq in unfinished(llm):
            llm.abort(seq.seq_id)
        assert llm.is_finished() and num_free(block_manager(llm)) == 16
        assert llm.step() == []
        assert serve(llm, PROMPTS, PARAMS) == expected()


def test_after_all_are_cancelled_new_ones_may_come_at_once():
    """What is still in flight was for the others, and its rows are nobody's."""
    with pipelined(**CROWDED) as llm:
        ids = add_all(llm, PROMPTS, PARAMS)
        for _ in range(6):
            llm.step()
        for seq_id in ids[::-1]:
            llm.abort(seq_id)
        assert serve(llm, PROMPTS[::-1], PARAMS[::-1]) == expected()[::-1]


def test_a_closed_stream_takes_its_placeholder_along():
    with pipelined() as llm:
        stream, other = llm.stream(PROMPTS[0], PARAMS[0]), llm.stream(PROMPTS[1], PARAMS[1])
        next(stream), next(other)
        stream.close()
        check_in_flight(llm)
        rest = [token_id for piece in other for token_id in piece["token_ids"]]
        assert rest == expected()[1]["token_ids"][1:]


# ---- Exceptions ----


def forward(llm, patch, broken) -> None:
    """While a step is launched."""
    patch.setattr(llm.model_runner.model, "forward", broken)


def prepare(llm, patch, broken) -> None:
    """Before anything of a step has reached the device."""
    patch.setattr(ModelRunner, "pack", broken)


def read(llm, patch, broken) -> None:
    """While the host waits for a step, and the next one runs."""
    patch.setattr(Result, "token_ids", broken)


def account(llm, patch, broken) -> None:
    """In the middle of accounting for a step: for some of its requests it is done."""
    receive, calls = Sequence.receive, count()

    def now_and_then(seq, *args):
        if next(calls) == 1:
            broken()
        receive(seq, *args)

    patch.setattr(Sequence, "receive", now_and_then)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_steps", [0, 1, 6])
@pytest.mark.parametrize("where", [forward, prepare, read, account])
def test_an_exception_leaves_an_empty_usable_engine(monkeypatch, where, num_steps, exception):
    """Wherever it comes from: no step is in flight, and no request keeps a placeholder."""

    def broken(*args, **kwargs):
        raise exception

    with pipelined(**CROWDED | dict(max_num_batched_tokens=64), enforce_eager=True) as llm:
        seqs = [llm.add(llm.make_sequence(*request)) for request in zip(PROMPTS, PARAMS)]
        for _ in range(num_steps):
            llm.step()
        with monkeypatch.context() as patch:
            where(llm, patch, broken)
            with pytest.raises(exception):
                for _ in range(4):
                    llm.step()
        check_done(llm)
        for seq in seqs:
            assert seq.finish_reason == "abort" and seq.num_pending_tokens == 0
            assert min(seq.token_ids) >= 0
        assert llm.step() == []
        assert serve(llm, PROMPTS, PARAMS) == expected()


@pytest.mark.parametrize("how", ["reset", "exit"])
def test_a_reset_with_a_step_in_flight(how):
    with pipelined(**CROWDED) as llm:
        seqs = [llm.add(llm.make_sequence(*request)) for request in zip(PROMPTS, PARAMS)]
        for _ in range(5):
            llm.step()
        getattr(llm, how)()
        check_done(llm)
        assert all(seq.finish_reason == "abort" and min(seq.token_ids) >= 0 for seq in seqs)
        if how == "reset":
            assert serve(llm, PROMPTS, PARAMS) == expected()


# ---- How many steps are run ----


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 10])
def test_no_step_is_run_past_a_known_length(monkeypatch, num_tokens):
    """As many steps as tokens, whether one request runs or three, and the engine is then idle."""
    for number in (1, 3):
        with pipelined() as llm:
            sizes = count_runs(llm, monkeypatch)
            add_all(llm, PROMPTS[:number], [greedy(num_tokens)] * number)
            for step in range(num_tokens):
                assert not llm.is_finished() and len(llm.step()) == number
                assert len(sizes) == min(step + 2, num_tokens)
            assert sizes == [number] * num_tokens
            check_done(llm)


def test_requests_of_different_lengths_leave_the_batch_in_time(monkeypatch):
    with pipelined() as llm:
        sizes = count_runs(llm, monkeypatch)
        serve(llm, PROMPTS, [greedy(n) for n in (1, 2, 2, 6)])
        assert sizes == [4, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("budget", [1, 4, 7, 10])
def test_chunks_take_as_many_steps_as_before(monkeypatch, budget):
    with pipelined(max_num_batched_tokens=budget) as llm:
        sizes = count_runs(llm, monkeypatch)
        serve(llm, PROMPTS[1:2], [greedy(6)])
        assert len(sizes) == -(-30 // budget) + 5


@pytest.mark.parametrize("place", [0, 1, 5, 8])
def test_a_stop_token_costs_at_most_one_step_more(monkeypatch, place):
    """And none where it is the last that the request may have."""
    with engine(async_scheduling=False) as llm:
        free = serve(llm, PROMPTS[:1], [greedy(20)])[0]["token_ids"]
    length = free.index(free[place]) + 1
    for max_tokens in (length, length + 1, 20):
        asked = SamplingParams(
            temperature=0, max_tokens=max_tokens, stop_token_ids=[free[place]], ignore_eos=True
        )
        for asynchronous in (True, False):
            with engine(async_scheduling=asynchronous) as llm:
                sizes = count_runs(llm, monkeypatch)
                (out,) = serve(llm, PROMPTS[:1], [asked])
            assert (len(out["token_ids"]), out["finish_reason"]) == (length, "stop")
            assert len(sizes) == length + (asynchronous and max_tokens > length)


# ---- Metrics ----


def test_times_are_measured_when_a_token_is_read(monkeypatch):
    """A clock that moves by one second whenever it is read: a step is a second."""
    ticks = count(100.0)
    for module in ("llm_engine", "scheduler"):
        monkeypatch.setattr(f"nanovllm.engine.{module}.perf_counter", lambda: next(ticks))
    with pipelined(max_num_batched_tokens=10) as llm:
        (out,) = llm.generate(PROMPTS[1], greedy(4), use_tqdm=False)
    assert out["metrics"] == dict(
        time_to_first_token=3.0, time_per_output_token=1.0, num_cached_tokens=0, num_preemptions=0
    )


def test_times_are_in_order():
    with pipelined(**CROWDED) as llm:
        seqs = [llm.add(llm.make_sequence(*request)) for request in zip(PROMPTS, PARAMS)]
        while not llm.is_finished():
            now = [seq.last_token_time for seq in seqs]
            grown = llm.step()
            for seq, before in zip(seqs, now, strict=True):
                assert (seq in grown) == (seq.last_token_time != before)
        for seq in seqs:
            assert seq.arrival_time < seq.first_token_time < seq.last_token_time
        assert llm.scheduler.num_preemptions == sum(seq.num_preemptions for seq in seqs) > 0

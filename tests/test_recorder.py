"""The recorder of the book's figures tells what the engine did, and leaves the engine as it was."""

from __future__ import annotations

import pickle

import matplotlib
import pytest
from matplotlib.figure import Figure

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from player import play
from player_schedule import play_schedule
from recorder import Trace, draw_occupancy, draw_pool, draw_timeline, record

OPTIONS = dict(
    kvcache_block_size=4, num_kvcache_blocks=20, max_num_seqs=3, max_num_batched_tokens=24
)
SHAPES = [(30, 18), (9, 30), (33, 12), (2, 1), (21, 16)]  # tokens of the prompt and the output


@pytest.fixture(scope="module")
def llm() -> LLM:
    """An engine that is short of everything that the stage at hand has a limit for."""
    known = {name: value for name, value in OPTIONS.items() if name in Config.__slots__}
    return LLM(device="cpu", max_model_len=128, **known)


def generate(llm: LLM) -> list[list[int]]:
    """The outputs of requests that share a beginning."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in SHAPES]
    prompts = [([7] * 8 + [100 + n] * n)[:n] for n, _ in SHAPES]
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def run(llm: LLM) -> tuple[Trace, list[list[int]]]:
    """The trace of these requests, and their outputs."""
    with record(llm) as trace:
        outputs = generate(llm)
    return trace, outputs


@pytest.fixture(scope="module")
def trace(llm: LLM) -> Trace:
    return run(llm)[0]


def scheduler(llm: LLM):
    return getattr(llm, "scheduler", llm)


def test_tokens_that_were_brought_add_up_to_the_outputs(llm: LLM) -> None:
    trace, outputs = run(llm)
    assert list(trace.names().values()) == list("ABCDE")
    for seq_id, (num_prompt, num_output), output in zip(trace.names(), SHAPES, outputs):
        assert len(output) == num_output
        at, num_sampled = 0, 0
        for step in trace.steps:
            assert step.end is not None and step.start <= step.end
            if seq_id in step.preempted:
                at = 0
            for part in step.parts:
                if part.seq_id != seq_id:
                    continue
                # It goes on where it was, or behind what is found in the cache.
                assert part.start == at or at == 0
                at = part.start + part.num_tokens
                num_sampled += at == num_prompt + num_sampled
                assert part.is_prefill or part.num_tokens == 1
        # The last token is not run.
        assert (at, num_sampled) == (num_prompt + num_output - 1, num_output)
        assert sum(step.finished.count(seq_id) for step in trace.steps) == 1
    assert sum(step.num_new_tokens for step in trace.steps) == sum(map(len, outputs))


def test_every_request_is_in_every_step_until_its_end(llm: LLM, trace: Trace) -> None:
    left = set(trace.names())
    for step in trace.steps:
        here = [part.seq_id for part in step.parts] + step.waiting
        assert sorted(here) == sorted(left) and set(step.preempted) <= set(step.waiting)
        left -= set(step.finished)
    assert not left
    if hasattr(llm, "scheduler"):  # from chapter 5 on
        assert any(step.preempted for step in trace.steps)


def test_blocks_hold_the_tokens_of_their_owners(llm: LLM, trace: Trace) -> None:
    if not hasattr(scheduler(llm), "block_manager"):
        assert trace.num_blocks == 0 and not any(step.blocks for step in trace.steps)
        return
    assert (trace.num_blocks, trace.block_size) == (20, 4)
    for step in trace.steps:
        held = {seq_id: 0 for seq_id in trace.names()}
        for use in step.blocks:
            assert 0 <= use.block_id < 20 and 0 <= use.num_filled <= 4
            for seq_id in use.owners:
                held[seq_id] += use.num_filled
        for part in step.parts:
            assert held[part.seq_id] == part.start + part.num_tokens
    assert not any(use.owners for use in trace.blocks_after)


def test_outputs_are_those_of_an_engine_that_is_not_recorded(llm: LLM) -> None:
    assert run(llm)[1] == generate(llm)


def test_engine_is_restored_after_an_exception(llm: LLM, monkeypatch) -> None:
    owner, before = scheduler(llm), set(vars(scheduler(llm)))
    with pytest.raises(ZeroDivisionError), record(llm) as trace:
        llm.add_request([5, 6, 7])
        llm.step()
        monkeypatch.setattr(llm.model_runner, "run", lambda seqs: 1 / 0)
        llm.step()
    monkeypatch.undo()
    assert set(vars(owner)) == before and owner.schedule.__self__ is owner
    assert [step.end is None for step in trace.steps] == [False, True]
    assert not any(use.owners for use in trace.blocks_after)
    assert len(run(llm)[0].steps) > 2


def test_a_step_that_raises_is_not_mistaken_for_the_next(llm: LLM, monkeypatch) -> None:
    with record(llm) as trace:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(llm.model_runner, "run", lambda seqs: 1 / 0)
            llm.generate([[5, 6, 7]], use_tqdm=False)
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1), use_tqdm=False)
    raised, done = trace.steps
    assert (raised.end, raised.finished) == (None, []) and len(done.finished) == 1


def test_recordings_nest(llm: LLM) -> None:
    with record(llm) as outer:
        inner, _ = run(llm)
        llm.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)
    assert len(outer.steps) == len(inner.steps) + 1
    assert outer.steps[0].parts == inner.steps[0].parts


def test_aborted_request_leaves_the_trace(llm: LLM) -> None:
    with record(llm) as trace:
        seq_id = llm.add_request([5] * 9, SamplingParams(max_tokens=9, ignore_eos=True))
        other = llm.add_request([6] * 9, SamplingParams(max_tokens=4, ignore_eos=True))
        llm.step()
        llm.abort(seq_id)
        while not llm.is_finished():
            llm.step()
    assert [part.seq_id for part in trace.steps[-1].parts] == trace.steps[-1].finished == [other]


def test_trace_survives_pickling(trace: Trace) -> None:
    assert pickle.loads(pickle.dumps(trace)) == trace


@pytest.mark.parametrize("size", [0, 1, None])
def test_figures_against_steps_do_not_depend_on_the_clock(trace: Trace, size, tmp_path) -> None:
    pages = []
    for pace in (1, 3):
        copy = pickle.loads(pickle.dumps(trace))
        copy.steps = copy.steps[:size]
        for step in copy.steps:
            step.start, step.end = pace * step.start, pace * step.end
        figure = Figure(layout="constrained")
        axes = figure.subplots(3)
        draw_pool(axes[0], copy)
        draw_timeline(axes[1], copy)
        draw_timeline(Figure().subplots(), copy, x="time")
        if copy.steps:
            draw_occupancy(axes[2], {"old": copy, "new": copy})
        with matplotlib.rc_context({"svg.hashsalt": "nanovllm"}):
            figure.savefig(tmp_path / "page.svg", metadata={"Date": None})
        pages.append((tmp_path / "page.svg").read_bytes())
    assert pages[0] == pages[1]


def test_a_recording_can_be_paged_through(llm: LLM) -> None:
    """Each step is a frame, one of them in view, and says what all requests do."""
    trace, _ = run(llm)
    if not trace.num_blocks:
        return  # this engine has no blocks to show
    html = play(trace, still=1)._repr_html_()
    frames = html.split('<div class="frame"')[1:]
    assert len(frames) == len(trace.steps)
    assert [frame.startswith(" hidden") for frame in frames] == [i != 1 for i in range(len(frames))]
    for step, shown in zip(trace.steps, frames):
        assert shown.count("<span ") == trace.num_blocks and shown.count("<tr>") == len(SHAPES)
        assert shown.count("gives its blocks back") == len(step.preempted)
        assert shown.count("ends") == len(step.finished)
        for part in step.parts:
            at = part.start + part.num_tokens - 1
            assert f" to {at}" in shown if part.num_tokens > 1 else f"token {at}" in shown


def test_a_schedule_tells_the_tokens_of_each_step(llm: LLM) -> None:
    """Whatever the chapter; an engine that has a budget keeps within it."""
    trace, _ = run(llm)
    budget = getattr(llm.config, "max_num_batched_tokens", 1000)
    frames = play_schedule(trace, budget).frames
    assert len(frames) == len(trace.steps)
    for number, (step, shown) in enumerate(zip(trace.steps, frames), start=1):
        num_tokens = sum(part.num_tokens for part in step.parts)
        title = f"<p>step {number} of {len(frames)}, {num_tokens} of {budget} tokens."
        assert shown.startswith(title) and num_tokens <= budget
        assert shown.count("blocks back") == (len(step.preempted) > 0)
        assert shown.count(" end") == (len(step.finished) > 0)

"""No step may do nothing while requests are left: its caller would wait for ever."""

import pytest
from device import PLAIN
from memory import check_empty, engine, greedy

PROMPT = [5, 6, 7]


def test_a_step_that_can_run_nobody_is_an_error(monkeypatch):
    """A request that nothing brings on is lost with an exception, and the engine is usable."""
    with engine() as llm:
        (expected,) = llm.generate(PROMPT, greedy(8), use_tqdm=False)
        with monkeypatch.context() as patch:
            patch.setattr(llm.scheduler, "schedule", list)
            with pytest.raises(RuntimeError, match="no request can run"):
                llm.generate(PROMPT, greedy(8), use_tqdm=False)
        check_empty(llm)
        (out,) = llm.generate(PROMPT, greedy(8), use_tqdm=False)
        assert out["token_ids"] == expected["token_ids"]


def test_a_finished_sequence_that_stays_behind_is_not_waited_for(monkeypatch):
    """What an interrupted change may leave: finished, and still among those that run."""
    with engine(**PLAIN) as llm:  # where steps overlap, the next account sweeps it away
        seq = llm.add(llm.make_sequence(PROMPT, greedy(20)))
        llm.step()
        seq.finish("abort")
        with pytest.raises(RuntimeError, match="no request can run"):
            for _ in range(20):
                llm.step()
        check_empty(llm)
        assert len(llm.generate(PROMPT, greedy(8), use_tqdm=False)[0]["token_ids"]) == 8

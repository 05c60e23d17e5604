"""Engines that launch a step while the one before runs, and what must hold between two steps."""

from __future__ import annotations

from memory import block_manager, check_books, check_empty, engine, unfinished

from nanovllm import LLM
from nanovllm.engine.outputs import output_of


def pipelined(**options):
    """`engine` with two steps in flight, on a CPU too."""
    return engine(**{"async_scheduling": True, **options})


def check_in_flight(llm: LLM) -> None:
    """The books are right, and placeholders are only where a token is on the way."""
    check_books(llm)
    assert len(llm.pipeline) < llm.config.max_in_flight
    for seq in unfinished(llm):
        rows = [
            step.seqs.index(seq)
            for step in llm.pipeline.steps
            if seq in step.seqs and step.grows[step.seqs.index(seq)]
        ]
        assert seq.token_ids[seq.num_known_tokens :] == [-1 - row for row in rows]
        assert seq.num_pending_tokens == len(rows)
        assert min(seq.token_ids[: seq.num_known_tokens]) >= 0
        assert seq.num_completion_tokens + len(rows) <= seq.params.max_tokens
    for prefixes in block_manager(llm).prefixes.values():
        assert all(min(prefix.token_ids) >= 0 for prefix in prefixes)


def check_done(llm: LLM) -> None:
    """No request, no step, no owned block is left."""
    check_empty(llm)
    if hasattr(llm, "model_runner"):  # else it has exited
        assert llm.step() == []  # which forgets what still runs for nobody
    assert not llm.pipeline


def serve(llm: LLM, prompts, params, between=lambda llm: None) -> list[dict]:
    """The results of these requests, checked after every step; `between(llm)` follows each."""
    seqs = [llm.add(llm.make_sequence(*request)) for request in zip(prompts, params, strict=True)]
    while not llm.is_finished():
        for seq in llm.step():
            assert min(seq.completion_token_ids) >= 0
        check_in_flight(llm)
        between(llm)
    check_done(llm)
    return [result(llm, seq) for seq in seqs]


def result(llm: LLM, seq) -> dict:
    """A finished request's output without its times."""
    assert seq.num_pending_tokens == 0 and min(seq.token_ids) >= 0
    output = output_of(seq, llm.tokenizer)
    del output["metrics"]
    return output


def count_runs(llm: LLM, monkeypatch) -> list[int]:
    """The number of sequences of every step that is launched from now on."""
    sizes, run = [], llm.model_runner.run

    def counting(seqs):
        sizes.append(len(seqs))
        return run(seqs)

    monkeypatch.setattr(llm.model_runner, "run", counting)
    return sizes

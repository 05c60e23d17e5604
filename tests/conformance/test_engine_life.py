"""An engine survives its interruptions, and several live side by side."""

import gc
import random
import weakref

import pytest
import torch
from device import PLAIN, build
from results import results

from nanovllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def interrupt_after(llm, monkeypatch, calls: int, exception: type[BaseException]) -> None:
    """Make the runner raise in the middle of a run, as Ctrl-C would."""
    run, left = llm.model_runner.run, [calls]

    def interrupted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise exception
        return run(*args, **kwargs)

    monkeypatch.setattr(llm.model_runner, "run", interrupted)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calls", [0, 3])
def test_interrupted_generate_leaves_an_empty_usable_engine(llm, monkeypatch, calls, exception):
    expected = results(llm.generate(["Hello", "Once"], GREEDY, use_tqdm=False))
    with monkeypatch.context() as patch:
        interrupt_after(llm, patch, calls, exception)
        with pytest.raises(exception):
            llm.generate(["Hello", "Once", "Tom"], GREEDY, use_tqdm=False)
    assert llm.is_finished()
    assert results(llm.generate(["Hello", "Once"], GREEDY, use_tqdm=False)) == expected


def test_interrupted_stream_leaves_an_empty_usable_engine(llm, monkeypatch):
    expected = results(llm.generate("Hello", GREEDY, use_tqdm=False))
    with monkeypatch.context() as patch:
        interrupt_after(llm, patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("Hello", GREEDY))
    assert llm.is_finished()
    assert results(llm.generate("Hello", GREEDY, use_tqdm=False)) == expected


def test_exception_inside_a_layer_leaves_no_batch_behind(make_llm, monkeypatch):
    llm = make_llm(**PLAIN)
    expected = results(llm.generate("Hello", GREEDY, use_tqdm=False))
    with monkeypatch.context() as patch:
        layer = llm.model_runner.model.model.layers[-1]

        def broken(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(layer, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Hello", GREEDY, use_tqdm=False)
    assert results(llm.generate("Hello", GREEDY, use_tqdm=False)) == expected


def test_two_engines_interleave(llm):
    other = build(dtype="float32")
    expected = llm.generate("Hello", GREEDY, use_tqdm=False)[0]["token_ids"]
    streams = [llm.stream("Hello", GREEDY), other.stream("Hello", GREEDY)]
    pieces = list(zip(*streams, strict=True))
    for i in range(2):
        assert [t for pair in pieces for t in pair[i]["token_ids"]] == expected
    other.exit()


def test_two_engines_with_different_models_take_turns(llm, random_folder, make_llm):
    other, expected = make_llm(random_folder), []
    for engine in (llm, other):
        outputs = engine.generate([[5, 6, 7], [8]], GREEDY, use_tqdm=False)
        expected.append([out["token_ids"] for out in outputs])
    ids = [
        [engine.add_request(prompt, GREEDY) for prompt in ([5, 6, 7], [8])]
        for engine in (llm, other)
    ]
    seqs: list[dict] = [{}, {}]
    while not (llm.is_finished() and other.is_finished()):
        for engine, found in zip((llm, other), seqs, strict=True):
            if not engine.is_finished():
                found.update({seq.seq_id: seq for seq in engine.step()})
    found = [[seqs[i][k].completion_token_ids for k in ids[i]] for i in range(2)]
    assert found == expected


def test_closing_a_stream_keeps_the_other_requests(llm):
    stream = llm.stream("Hello", SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    other = llm.add_request("Once", GREEDY)
    stream.close()
    assert not llm.is_finished()
    llm.abort(other)
    assert llm.is_finished()


def test_the_callers_random_state_is_left_alone(make_llm):
    """Neither torch's generator nor Python's moves: sampling has no hidden state."""
    before = torch.random.get_rng_state(), random.getstate()
    llm = make_llm()
    llm.generate("Hello", SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    llm.exit()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_gradients_work_between_the_pieces_of_a_stream(llm):
    for _ in llm.stream("Hello", GREEDY):
        x = torch.ones(2, requires_grad=True)
        x.sum().backward()
        assert x.grad is not None


def test_a_failed_construction_leaves_the_defaults_and_the_next_engine_alone(tmp_path, make_llm):
    with pytest.raises(ValueError):
        make_llm(tmp_path, dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32
    llm = make_llm()
    assert len(llm.generate("Hello", GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


def test_exit_gives_the_model_back_though_its_runner_is_still_held():
    llm = build()
    runner, model = llm.model_runner, weakref.ref(llm.model_runner.model)
    llm.generate("Hello", GREEDY, use_tqdm=False)
    llm.exit()
    gc.collect()
    assert model() is None and runner is not None


def test_exit_hands_the_gpus_memory_back_to_others_and_a_second_one_does_not(monkeypatch):
    """The twin of a test on a GPU: torch keeps what is freed until it is told to let it go."""
    llm, held = build(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(model() is not None))
    model = weakref.ref(llm.model_runner.model)
    llm.exit()
    llm.exit()
    assert held == [False]


def test_exit_twice_is_fine_and_use_after_it_is_an_error():
    llm = build()
    begun = llm.stream("Hello")
    llm.exit()
    llm.exit()
    for use in (
        llm.step,
        lambda: llm.add_request("Hello"),
        lambda: llm.generate("Hello", use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "Hello"}], use_tqdm=False),
        lambda: llm.stream("Hello"),
        lambda: next(begun),
    ):
        with pytest.raises(RuntimeError, match="exited"):
            use()
    assert llm.is_finished()

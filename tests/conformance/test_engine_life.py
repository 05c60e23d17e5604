"""An engine survives its interruptions, and several live side by side."""

import pytest

from nanovllm import LLM, SamplingParams

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
    expected = llm.generate(["Hello", "Once"], GREEDY, use_tqdm=False)
    with monkeypatch.context() as patch:
        interrupt_after(llm, patch, calls, exception)
        with pytest.raises(exception):
            llm.generate(["Hello", "Once", "Tom"], GREEDY, use_tqdm=False)
    assert llm.is_finished()
    assert llm.generate(["Hello", "Once"], GREEDY, use_tqdm=False) == expected


def test_interrupted_stream_leaves_an_empty_usable_engine(llm, monkeypatch):
    expected = llm.generate("Hello", GREEDY, use_tqdm=False)
    with monkeypatch.context() as patch:
        interrupt_after(llm, patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("Hello", GREEDY))
    assert llm.is_finished()
    assert llm.generate("Hello", GREEDY, use_tqdm=False) == expected


def test_exception_inside_a_layer_leaves_no_batch_behind(llm, monkeypatch):
    expected = llm.generate("Hello", GREEDY, use_tqdm=False)
    with monkeypatch.context() as patch:
        layer = llm.model_runner.model.model.layers[-1]

        def broken(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(layer, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Hello", GREEDY, use_tqdm=False)
    assert llm.generate("Hello", GREEDY, use_tqdm=False) == expected


def test_two_engines_interleave(llm):
    other = LLM(dtype="float32", device="cpu")
    expected = llm.generate("Hello", GREEDY, use_tqdm=False)[0]["token_ids"]
    streams = [llm.stream("Hello", GREEDY), other.stream("Hello", GREEDY)]
    pieces = list(zip(*streams, strict=True))
    for i in range(2):
        assert [t for pair in pieces for t in pair[i]["token_ids"]] == expected
    other.exit()


def test_exit_twice_is_fine_and_use_after_it_is_an_error():
    llm = LLM(device="cpu")
    llm.exit()
    llm.exit()
    with pytest.raises(RuntimeError, match="exited"):
        llm.generate("Hello")

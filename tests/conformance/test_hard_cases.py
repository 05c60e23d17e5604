"""Laws that a plain implementation breaks: interleaved callers, an engine's end, extreme values."""

from itertools import zip_longest
from pathlib import Path

import pytest
from device import build
from results import results

from nanovllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def joined(pieces) -> tuple[list[int], str | None]:
    """A stream's token ids and how it ended."""
    pieces = [piece for piece in pieces if piece is not None]
    return [t for piece in pieces for t in piece["token_ids"]], pieces[-1]["finish_reason"]


def test_interleaved_streams_of_one_engine_are_each_complete(llm):
    expected = [llm.generate(p, GREEDY, use_tqdm=False)[0]["token_ids"] for p in ("Hello", "Once")]
    pieces = list(zip_longest(*(llm.stream(prompt, GREEDY) for prompt in ("Hello", "Once"))))
    for i in range(2):
        assert joined(pair[i] for pair in pieces) == (expected[i], "length")
    assert llm.is_finished()


def test_generate_between_two_pieces_of_a_stream_takes_nothing_from_it(llm):
    expected = llm.generate("Hello", GREEDY, use_tqdm=False)[0]["token_ids"]
    stream = llm.stream("Hello", GREEDY)
    pieces = [next(stream)]
    llm.generate("Once", GREEDY, use_tqdm=False)
    assert joined(pieces + list(stream)) == (expected, "length")


@pytest.mark.parametrize("how", ["abort", "reset", "exit"])
def test_a_stream_whose_request_is_gone_ends_as_aborted(how):
    llm = build(dtype="float32")
    stream = llm.stream("Hello", GREEDY)
    first = next(stream)
    {"abort": lambda: llm.abort(0), "reset": llm.reset, "exit": llm.exit}[how]()
    assert joined([first, *stream]) == (first["token_ids"], "abort")
    assert llm.is_finished()
    llm.exit()


def test_a_step_without_requests_does_nothing(llm):
    assert llm.step() == []


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_step_leaves_an_empty_engine(llm, monkeypatch, exception):
    def broken(*args, **kwargs):
        raise exception

    for prompt in ("Hello", "Once", "Tom"):
        llm.add_request(prompt, GREEDY)
    llm.step()
    with monkeypatch.context() as patch:
        patch.setattr(llm.model_runner, "run", broken)
        with pytest.raises(exception):
            llm.step()
    assert llm.is_finished()
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0]["finish_reason"] == "length"


def test_a_refused_call_does_not_move_the_engines_seeds(make_llm):
    wild = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    used, fresh = make_llm(seed=3), make_llm(seed=3)
    with pytest.raises(ValueError):
        used.generate(["Hello", ""], wild, use_tqdm=False)
    draws = [results(llm.generate("Hello", wild, use_tqdm=False)) for llm in (used, fresh)]
    assert draws[0] == draws[1]


def test_a_model_may_be_a_path(bundled):
    build(Path(bundled)).exit()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-40, 1e-60])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_smallest_temperatures_are_greedy(llm, temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=8, ignore_eos=True)
    outputs = llm.generate(["Once upon a time"] * 2, [params, GREEDY], use_tqdm=False)
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"]


@pytest.mark.parametrize(
    "options",
    [
        dict(seed=-1),
        dict(seed=-(2**63)),
        dict(seed=2**63 - 1),
        dict(top_k=10**5),
        dict(top_k=2**31),
        dict(temperature=1e30),
        dict(temperature=1e300),
        dict(temperature=10**300),
        dict(top_p=1e-300),
    ],
    ids=str,
)
def test_the_largest_values_that_are_admitted_run(llm, options):
    params = SamplingParams(max_tokens=3, ignore_eos=True, **options)
    assert len(llm.generate("Hello", params, use_tqdm=False)[0]["token_ids"]) == 3

"""Engines in several threads of one process share no state: what a step needs is its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from threading import Barrier, Event, Thread

import pytest
import torch
from checkpoints import SMALL, random_prompts
from device import PLAIN, build, offered

from nanovllm import SamplingParams
from nanovllm.models import MODELS
from nanovllm.utils.torch_settings import without_cudnn

WAIT = 60  # seconds, for the other thread
PROMPTS = random_prompts((5, 9, 2), SMALL["vocab_size"], seed=110)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def side_by_side(*works: Callable[[], object]) -> list:
    """What each returns, in a thread of its own; an exception in one is raised here."""
    found: list = [None] * len(works)

    def run(number: int) -> None:
        try:
            found[number] = works[number]()
        except BaseException as error:
            found[number] = error

    threads = [Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def test_engines_of_two_types_are_built_at_once(monkeypatch, random_folder):
    """Each while the other is half built: its weights have its type, and torch's is as it was."""
    barrier, (name, model) = Barrier(2), next(iter(MODELS.items()))

    def slow(*args, **kwargs):
        barrier.wait(WAIT)  # both have begun
        built = model(*args, **kwargs)
        barrier.wait(WAIT)  # neither has ended
        return built

    monkeypatch.setitem(MODELS, name, slow)
    kinds = ("float16", "bfloat16")
    options = PLAIN | offered(num_kvcache_blocks=8)  # what is free changes under both
    engines = side_by_side(
        *(lambda kind=kind: build(random_folder, dtype=kind, **options) for kind in kinds)
    )
    for engine, kind in zip(engines, kinds, strict=True):
        parameters = engine.model_runner.model.parameters()
        assert {p.dtype for p in parameters} == {getattr(torch, kind)}
    assert torch.get_default_dtype() == torch.float32
    assert side_by_side(torch.get_default_dtype) == [torch.float32]


def tokens(llm) -> list[list[int]]:
    return [out["token_ids"] for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def test_engines_in_two_threads_give_the_tokens_that_they_give_alone(monkeypatch, make_llm):
    """Each step of one begins within a step of the other, round after round."""
    engines = [make_llm(**PLAIN) for _ in range(2)]
    alone, barrier = tokens(engines[0]), Barrier(2)
    for engine in engines:
        forward = engine.model_runner.model.forward

        def meeting(*args, forward=forward):
            barrier.wait(WAIT)
            hidden = forward(*args)
            barrier.wait(WAIT)
            return hidden

        monkeypatch.setattr(engine.model_runner.model, "forward", meeting)
    for _ in range(3):
        found = side_by_side(*(lambda engine=engine: tokens(engine) for engine in engines))
        assert found == [alone, alone]


def test_engines_run_freely_in_two_threads(make_llm):
    """With nobody to time their steps, and other requests in either."""
    engines = [make_llm(**PLAIN) for _ in range(2)]
    styles = [SamplingParams(max_tokens=12, ignore_eos=True, seed=n) for n in (1, 2)]

    def several(llm, style) -> list:
        rounds = [llm.generate(PROMPTS, style, use_tqdm=False) for _ in range(5)]
        return [[out["token_ids"] for out in outputs] for outputs in rounds]

    pairs = list(zip(engines, styles, strict=True))
    alone = [several(*pair) for pair in pairs]
    assert side_by_side(*(lambda pair=pair: several(*pair) for pair in pairs)) == alone


def test_each_thread_has_its_own_batch():
    """A step that runs is nobody else's, and begins in no other of its thread."""
    if find_spec("nanovllm.utils.context") is None:  # from chapter 2 on
        return
    from nanovllm.utils.context import get_context, set_context

    one, two = object(), object()
    with pytest.raises(RuntimeError, match="no batch is being run"):
        get_context()
    with set_context(one):
        assert get_context() is one

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="no batch is being run"):
                get_context()
            with set_context(two):
                assert get_context() is two

        side_by_side(elsewhere)
        assert get_context() is one
        with pytest.raises(RuntimeError, match="already"), set_context(two):
            pass
        assert get_context() is one
    with pytest.raises(RuntimeError, match="no batch is being run"):
        get_context()


def test_steps_that_overlap_leave_torchs_attention_as_it_was():
    """The second begins, or would begin, while the first runs, and ends after it."""
    before, device = torch.backends.cuda.cudnn_sdp_enabled(), torch.device("cuda")
    first_runs, second_runs, first_ended = Event(), Event(), Event()

    def first() -> bool:
        with without_cudnn(device):
            first_runs.set()
            second_runs.wait(0.5)  # in vain, if it has to wait for its turn
            found = torch.backends.cuda.cudnn_sdp_enabled()
        first_ended.set()
        return found

    def second() -> bool:
        first_runs.wait(WAIT)
        with without_cudnn(device):
            second_runs.set()
            first_ended.wait(WAIT)
            return torch.backends.cuda.cudnn_sdp_enabled()

    assert side_by_side(first, second) == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with without_cudnn(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before

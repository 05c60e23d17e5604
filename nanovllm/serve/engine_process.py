"""An engine in a process of its own, or in a thread of this one."""

import json
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from threading import Thread
from typing import Any

from nanovllm.engine.guide import prepare_guides
from nanovllm.engine.parallel_runner import interrupts_wait
from nanovllm.engine.requests import Limits
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.serve.engine_loop import EngineLoop
from nanovllm.utils.checkpoint import find_checkpoint
from nanovllm.utils.errors import one_line


@dataclass(frozen=True, slots=True)
class About:
    """What one has to know of an engine to put requests to it."""

    model: str  # how it was asked for
    tokenizer: Any
    limits: Limits
    defaults: dict[str, float]  # how the checkpoint's makers want it to be sampled


def about(llm: LLM) -> About:
    """What to tell of an engine that is ready, for grammars as well."""
    prepare_guides(llm.tokenizer, llm.model_config.vocab_size)
    defaults = sampling_defaults(find_checkpoint(llm.config.model))
    return About(llm.config.model or "nanovllm-tiny", llm.tokenizer, llm.limits, defaults)


def in_thread(llm: LLM) -> Connection:
    """Let a thread step an engine; the pipe to it, whose first message is `about` it."""
    ours, theirs = multiprocessing.Pipe()

    def live() -> None:
        theirs.send(about(llm))  # a tokenizer can be larger than a pipe
        EngineLoop(llm, theirs).run()

    Thread(target=live, name="engine", daemon=True).start()
    return ours


SUGGESTED = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"


def sampling_defaults(folder: Path) -> dict[str, float]:
    """How a checkpoint's generation_config.json suggests to sample; what is no option is left."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if values.get("do_sample") is False:
        return {}
    found = {name: values[name] for name in SUGGESTED if values.get(name) is not None}
    SamplingParams(**found)  # a ValueError says what does not fit
    return found


CONTEXT = multiprocessing.get_context("spawn")


@contextmanager
def deaf() -> Iterator[None]:
    """A terminal's Ctrl-C does not reach a process that is started inside: who starts it decides.

    It inherits that the signal is blocked. One that comes here meanwhile waits for the end, when
    all that was started has been noted.
    """
    ensure_running()  # else `start` does it, and lets the signal through behind it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with interrupts_wait():  # one that another of our threads has got
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_process(options: dict[str, Any], num_pipes: int = 1) -> tuple[list[Connection], Any]:
    """Build an engine in a process of its own: the pipes to it, and the process.

    options: of `LLM`. The first message is `about` it, or the error that it failed with.
    """
    ours, theirs = zip(*(CONTEXT.Pipe() for _ in range(num_pipes)), strict=True)
    process = CONTEXT.Process(target=work, args=(theirs, options), name="engine")
    with deaf():
        process.start()
    for pipe in theirs:
        pipe.close()  # so that the end of the process is the end of the pipes
    return list(ours), process


def work(pipes: tuple[Connection, ...], options: dict[str, Any]) -> None:
    """The process's life. It ends when the pipes do; signals are for the one who started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        llm = LLM(**options)
        first: Any = about(llm)
    except Exception as error:
        first = (ValueError if isinstance(error, ValueError) else RuntimeError)(one_line(error))
    for pipe in pipes:
        with suppress(OSError):  # its other end is gone: the loop will see it
            pipe.send(first)
    if isinstance(first, About):
        EngineLoop(llm, *pipes).run()
        llm.exit()

"""The exercises of chapters 13 and 14, as checks."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from checks import Wrong, exercise, made_by, near

# ---- Chapter 13 ----


def entry(number: int, name: str, row: bytes = b"{}") -> bytes:
    """An entry of a journal."""
    from zlib import crc32

    text = b"%d %s %s\n" % (number, name.encode(), row)
    return b"%08x %s" % (crc32(text), text)


@exercise
def after_a_kill(rule: Callable[[bytes, list[Any]], list[int]]) -> None:
    """`rule(journal, lines)` -> the numbers of the lines that have to be asked (again)."""
    from nanovllm.serve.batch_file import Journal, Line

    lines = [Line(number, f"batch_req_{number}", b"") for number in range(1, 6)]
    one, two, three = (entry(n, f"batch_req_{n}", b'{"id": 1 2}') for n in (1, 2, 3))
    edited = entry(2, "batch_req_of_another_text")
    with tempfile.TemporaryDirectory() as folder:
        for what, text in {
            "no journal": b"",
            "two whole entries": three + one,
            "a torn last entry": three + one + two[:-3],
            "a last entry without its line's end": one + two[:-1],
            "a spoilt entry before two whole ones": one + two.replace(b"1", b"7") + three + one,
            "an entry for another text of line 2": edited + one,
            "line 2 answered, and then another text of it": two + edited,
            "the same entry twice": one + one,
        }.items():
            Path(folder, "journal").write_bytes(text)
            journal = Journal(Path(folder, "journal"))
            right = [line.number for line in lines if journal.find(line) is None]
            journal.is_needed = False
            journal.close()
            found = made_by(rule, text, list(lines))
            if found != right:
                raise Wrong(f"{what}: {found!r} is not {right}")


def waits_of(sync_s: float | None) -> int:
    """How often a journal waits for the disk in a minute of 100 rows a second; None: as it is."""
    import nanovllm.serve.batch_file

    module: Any = nanovllm.serve.batch_file
    before, now, count = (module.os, module.perf_counter, module.SYNC_S), [0.0], Counter[str]()
    own_os = SimpleNamespace(**{**vars(os), "fsync": lambda _: count.update(["waits"])})
    with tempfile.TemporaryDirectory() as folder:
        try:
            module.os, module.perf_counter = own_os, lambda: now[0]
            module.SYNC_S = module.SYNC_S if sync_s is None else sync_s
            journal = module.Journal(Path(folder, "journal"))
            count.clear()  # it has waited for its name
            for row in range(1, 6001):
                now[0] = row / 100
                journal.add(module.Line(1, "batch_req_1", b""), b"{}")
            journal.close()
        finally:
            module.os, module.perf_counter, module.SYNC_S = before
    return count["waits"]


@exercise
def disk_waits(waits: float, waits_each: float, most_rows: float) -> None:
    """Waits in a minute of 100 rows a second, and the most rows a second if each one waits."""
    hint = "it waits with the first row that comes 5 s after the last wait"
    near("waits", waits, waits_of(None), hint, 0.1)
    near("waits_each", waits_each, waits_of(0.0), "each row that is added waits", 0)
    near("most_rows", most_rows, 200, "each row costs at least the 5 ms that the disk takes")


@exercise
def look_ahead() -> None:
    """A batch whose rows come together where they begin alike, and that looks 100 lines ahead."""
    from nanovllm.serve.batch import unanswered
    from nanovllm.serve.batch_file import Journal, Line

    def body(number: int) -> dict[str, str]:
        return {"prompt": f"Document {number * 7 % 4}: a long text. Question {number}"}

    def lines() -> Iterator[Line]:
        for number in range(1, 301):
            asked: dict[str, Any] = {
                "custom_id": str(number),
                "method": "POST",
                "url": "/v1/completions",
            }
            asked["body"], read[0] = body(number), number
            yield Line(number, f"batch_req_{number}", json.dumps(asked).encode())

    read: list[int] = [0]
    places: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder, "journal"))
        for row in unanswered(lines(), journal, lambda row, reply: None):
            if read[0] > len(places) + 101:
                raise Wrong(f"for row {len(places) + 1} of the engine {read[0]} lines were read")
            places.append(row.line.number)
        journal.is_needed = False
        journal.close()
    if sorted(places) != list(range(1, 301)):
        raise Wrong("not every line comes to the engine once")
    turns = sum(a * 7 % 4 != b * 7 % 4 for a, b in zip(places, places[1:]))
    if turns > 15:
        raise Wrong(f"the document changes {turns} times in 300 rows about four documents")


# ---- Chapter 14 ----


@exercise
def batch(size: float) -> None:
    """The batch at which a token of Qwen3-30B-A3B costs half of what it costs alone."""
    near("size", size, 10, "compare weights_read(config, [B]) with B times weights_read of one", 0)


@exercise
def experts_read(eight: float, many: float, alike: float) -> None:
    """Of 128 experts: those that 8 tokens read, 64 of them, and 64 that are alike."""
    import torch

    from nanovllm.kernels.routing import route

    generator, found = torch.Generator().manual_seed(0), []
    for count in (8, 64):
        logits = torch.randn(200, count, 128, generator=generator)
        chosen = [route(part, 8, norm=True)[0].unique().numel() for part in logits]
        found.append(sum(chosen) / len(chosen))
    found.append(route(logits[0, :1].repeat(64, 1), 8, norm=True)[0].unique().numel())
    hint = "a token leaves an expert alone with a chance of 1 - 8 / 128"
    near("eight", eight, found[0], hint, 0.05)
    near("many", many, found[1], hint, 0.05)
    near("alike", alike, found[2], "they all choose the same ones", 0)


@exercise
def plan(rule: Callable[[list[list[int]], int], tuple[list[int], list[int]]]) -> None:
    """`rule(experts, num_experts)` -> the pairs by experts, and where each expert's begin."""
    for experts, number in (
        ([[1, 3], [3, 0], [0, 1]], 5),
        ([[2]], 3),
        ([[0, 1, 2]] * 3, 3),
        ([[4, 1], [1, 4], [4, 0]], 6),
    ):
        pairs = [expert for chosen in experts for expert in chosen]
        right = sorted(range(len(pairs)), key=pairs.__getitem__)
        starts = [sum(expert < e for expert in pairs) for e in range(number + 1)]
        found = made_by(rule, [list(chosen) for chosen in experts], number)
        if not isinstance(found, tuple) or list(map(list, found)) != [right, starts]:
            raise Wrong(f"of {experts} and {number}: {found!r} is not {(right, starts)}")


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def tokens_from(folder: str, architecture: str, model_type: str, **own: Any) -> list[list[int]]:
    """What an engine with random weights answers, of a config.json that says this."""
    from nanovllm import LLM, SamplingParams

    said = {"architectures": [architecture], "model_type": model_type, **SMALL, **own}
    Path(folder, "config.json").write_text(json.dumps(said))
    llm = LLM(folder, load_format="dummy", device="cpu", dtype="float32")
    try:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        outputs = llm.generate([[5, 6, 7]], params, use_tqdm=False)
        return [output["token_ids"] for output in outputs]
    finally:
        llm.exit()


@exercise
def mistral() -> None:
    """An engine that runs Mistral, and refuses what it can't run of it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = tokens_from(folder, "MistralForCausalLM", "mistral", sliding_window=None)
        except ValueError as error:
            raise Wrong(f"it is refused: {error}") from error
        if found != tokens_from(folder, "LlamaForCausalLM", "llama"):
            raise Wrong("a Llama with the same weights gives other tokens")
        tokens_from(folder, "Qwen2ForCausalLM", "qwen2", sliding_window=16)
        try:
            tokens_from(folder, "MistralForCausalLM", "mistral", sliding_window=16)
        except ValueError as error:
            if "sliding_window" in str(error):
                return
        raise Wrong("a sliding window of 16 tokens is not refused by its name")

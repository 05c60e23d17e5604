"""A served text is `generate`'s, however the tokens are cut into pieces."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from itertools import count
from pathlib import Path
from random import Random

import pytest
from scripted import SPECIAL, VOCAB, byte_fallback_tokenizer, tokens
from transformers import AutoTokenizer

import nanovllm
from nanovllm import SamplingParams
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.requests import make_sequence
from nanovllm.serve.asked import completion_params
from nanovllm.serve.client import EngineClient, pieces
from nanovllm.serve.engine_process import about, in_thread
from nanovllm.serve.protocol import CompletionRequest, Sampling

TEXTS = "a", " ", "ñ", "€", "🙂", "ab", "xyz", " a", "漢", "once upon"
BYTES = b"\xc3\xb1\xe2\x82\xac\xf0\x9f\x99\x82\xff\x20\x61"


def alphabet(kind: str, broken: bool) -> tuple[object, list[list[int]]]:
    """A tokenizer, and what texts are made of: characters, and with `broken` bytes of them."""
    if kind == "bytes":
        tokenizer = AutoTokenizer.from_pretrained(Path(nanovllm.__file__).with_name("tiny"))
        encode = tokenizer.backend_tokenizer.encode
        found = [encode(text, add_special_tokens=False).ids for text in TEXTS]
        # Each byte is a token, written as the character that stands for it.
        bytes_of = [i for text in "ñ€🙂\xff" for i in encode(text, add_special_tokens=False).ids]
        parts = [[token_id] for token_id in bytes_of]
    else:
        tokenizer = byte_fallback_tokenizer()
        found = [tokens(text.encode()) for text in TEXTS]
        found += [tokens("a"), [VOCAB["▁a"]], [VOCAB["▁"]], [VOCAB["xyz"]], [SPECIAL]]
        parts = [[token_id] for token_id in tokens(BYTES)]
    return tokenizer, found + (parts if broken else [])


def one_by_one(tokenizer, line: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """The text, and how many tokens it takes: the engine ends a request at a stop string."""
    reader, length = Detokenizer(tokenizer, stop), 0
    while length < len(line) and not reader.has_stopped:
        reader.append(line[length])
        length += 1
    reader.flush()
    return reader.take_ready(), length


@pytest.mark.parametrize("stop", [(), ("\ufffd\ufffd",), ("a b", "ab", "ñ", "xyza")])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_pieces_of_any_size_join_to_one_text_whatever_the_bytes(kind, broken, stop):
    (tokenizer, parts), random, decoded = alphabet(kind, broken), Random(0), 0
    for _ in range(300):
        line = [t for c in random.choices(parts, k=random.randint(1, 30)) for t in c]
        text, length = one_by_one(tokenizer, line, stop)
        reader, found, at = Detokenizer(tokenizer, stop), "", 0
        while at < length:
            size = random.choice([1, 2, 3, 7, 30])
            reader.extend(line[at : min(at + size, length)])
            at += size
            found += reader.take_ready()
        reader.flush()
        assert found + reader.take_ready() == text, (line, stop)
        decoded += length
    assert decoded > 1000


def test_who_wants_the_whole_reply_is_told_once(llm):
    """The same text, tokens and log-probabilities as piece by piece, and of a lost one its end."""
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=2, ignore_eos=True)

    async def told(whole: bool) -> tuple[int, list, str]:
        about, texts = client.about, ("Once upon a time", "A fox")
        news.clear()
        seqs = [make_sequence(count(), x, params, about.tokenizer, about.limits) for x in texts]
        found = [[], []]
        async for index, piece in pieces(client.submit(seqs, whole)):
            found[index].append(piece)
        assert [found[i][-1]["finish_reason"] for i in (0, 1)] == ["length", "length"]
        join = [(sum((p[k] for p in f), [])) for f in found for k in ("token_ids", "logprobs")]
        return len(news), join, ["".join(p["text"] for p in f) for f in found]

    async def both() -> None:
        client.start()
        (many, *streamed), (few, *whole) = await told(False), await told(True)
        assert streamed == whole and few == 2 < 30 < many
        client.close()

    news: list = []
    client = EngineClient(in_thread(llm))
    hand_out = client.hand_out
    client.hand_out = lambda told: (news.extend(told), hand_out(told))
    asyncio.run(both())


NOT_ITS_DEFAULT = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.25, "seed": 7, "stop": ["x"],
    "stop_token_ids": [5], "ignore_eos": True, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repetition_penalty": 1.5, "logit_bias": {"7": 1.0},
}  # fmt: skip
# What chat and completions ask for in words of their own.
OTHERWISE = "max_tokens", "logprobs", "prompt_logprobs", "json_schema", "grammar"


@pytest.mark.parametrize("name", sorted({x.name for x in fields(SamplingParams)}))
def test_what_a_body_has_of_the_engines_options_reaches_the_engine(llm, name):
    """A field that is read, and then left, would be a wish that nobody hears."""
    if name not in Sampling.model_fields:
        assert name in OTHERWISE
        return
    body = CompletionRequest(prompt="x", **{name: NOT_ITS_DEFAULT[name]})
    found = getattr(completion_params(body, about(llm)), name)
    assert found != getattr(SamplingParams(), name)
    assert found in (NOT_ITS_DEFAULT[name], {7: 1.0}, ("x",), (5,))

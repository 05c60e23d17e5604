"""A served text is `generate`'s, however the tokens are cut into pieces."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from scripted import SPECIAL, VOCAB, byte_fallback_tokenizer, tokens
from transformers import AutoTokenizer

import nanovllm
from nanovllm.engine.detokenizer import Detokenizer

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

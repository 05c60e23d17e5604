"""A served text is `generate`'s, however the tokens are cut into pieces."""

from __future__ import annotations

from random import Random

import pytest
from scripted import SPECIAL, VOCAB, byte_fallback_tokenizer, tokens

from nanovllm.engine.detokenizer import Detokenizer

CHARACTERS = [tokens(c.encode()) for c in "a ñ€🙂"]
CHARACTERS += [tokens("a"), tokens("b"), [VOCAB["▁a"]], [VOCAB["▁"]], [VOCAB["xyz"]], [SPECIAL]]
PARTS = [[token_id] for token_id in tokens(b"\xc3\xb1\xe2\x82\xac\xf0\x9f\x99\x82\xff\x20\x61")]


def one_by_one(tokenizer, line: list[int], stop: tuple[str, ...]) -> tuple[str, int]:
    """The text, and how many tokens it takes: the engine ends a request at a stop string."""
    reader, length = Detokenizer(tokenizer, stop), 0
    while length < len(line) and not reader.has_stopped:
        reader.append(line[length])
        length += 1
    reader.flush()
    return reader.take_ready(), length


@pytest.mark.parametrize("stop", [(), ("\ufffd\ufffd",), ("a b", "ab", "ñ", "xyza")])
@pytest.mark.parametrize("alphabet", [CHARACTERS, CHARACTERS + PARTS])
def test_pieces_of_any_size_join_to_one_text_whatever_the_bytes(alphabet, stop):
    tokenizer, random, decoded = byte_fallback_tokenizer(), Random(0), 0
    for _ in range(300):
        line = [t for c in random.choices(alphabet, k=random.randint(1, 30)) for t in c]
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

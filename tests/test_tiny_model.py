"""The bundled model: its files, its shape, and what it can do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "book" / "tiny"))

import evaluate
import stories
import train
from checkpoint import CHAT_TEMPLATE, MODEL_SHAPE
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM


@pytest.fixture(scope="module")
def evaluator(tiny: Path) -> evaluate.Evaluator:
    return evaluate.load(tiny, "cpu")


def test_the_folder_is_under_8_mb_and_complete(tiny: Path) -> None:
    files = {path.name: path.stat().st_size for path in tiny.iterdir() if path.is_file()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } == set(files)
    assert sum(files.values()) < 8_000_000


def test_the_shape_suits_every_kernel_and_tensor_parallel_path(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.head_dim == 64
    assert config.num_key_value_heads % 4 == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.tie_word_embeddings
    flat = json.loads((tiny / "config.json").read_text())
    assert {name: flat[name] for name in MODEL_SHAPE} == MODEL_SHAPE
    assert config.rope_parameters["rope_theta"] == flat["rope_theta"]


def test_it_loads_as_qwen3_in_bfloat16(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.bfloat16
    assert len(model.generation_config.eos_token_id) == 2


@pytest.mark.parametrize(
    "text",
    ["", " ", "Once upon a time", "naïve – 你好 🦊\n\t x", "def f(x):\n    return x", "\x00\x7f"],
)
def test_any_text_has_an_encoding_and_comes_back(tiny: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < MODEL_SHAPE["vocab_size"] for token in ids)


def test_the_chat_template_is_chatml_and_round_trips(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Tell me a story."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nTell me a story.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.eos_token_id) == 4
    assert "<|im_start|>" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_stories_end_and_are_grammatical(evaluator: evaluate.Evaluator) -> None:
    figures, _ = evaluate.evaluate_stories(evaluator, seed=1, count=16)
    assert figures["stories_that_end"] >= 0.9
    assert figures["sentences_accepted"] >= 0.95


def test_questions_about_fresh_stories_are_answered(evaluator: evaluate.Evaluator) -> None:
    figures, wrong = evaluate.evaluate_questions(evaluator, seed=1, count=16)
    assert figures["answers_right"] >= 0.7, wrong


def test_many_stories_in_a_row_still_read_well(evaluator: evaluate.Evaluator) -> None:
    torch.manual_seed(0)
    batch = evaluator.tokenizer("Once upon a time", return_tensors="pt")
    ids = evaluator.model.generate(
        **batch, max_new_tokens=1200, do_sample=True, temperature=0.7, top_k=0, eos_token_id=None
    )
    texts = evaluator.tokenizer.decode(ids[0]).split("<|endoftext|>")[:-1]
    assert len(texts) >= 5
    good, total = map(sum, zip(*(stories.share_accepted(text) for text in texts), strict=True))
    assert good / total >= 0.9


def test_training_runs_and_its_checkpoint_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--quick"])
    train.main()
    report = json.loads((tmp_path / "log" / "training_log.json").read_text())
    assert report["log"][-1]["story_loss"] < report["log"][0]["story_loss"]
    assert evaluate.load(tmp_path, "cpu").complete(["Once"], 3, 0.0) in ([None], [""])

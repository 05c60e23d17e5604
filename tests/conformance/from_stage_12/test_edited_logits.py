"""Biases and grammars: the logits that a token is drawn from are those that a request asks for."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext

import pytest
import torch
from checkpoints import random_prompts, save_random
from device import ON_GPU, PLAIN, build, offered
from replaying import record, replays

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.jit import interpreted

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"enum": [1, 20, 300]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WAYS = {
    "plain": dict(PLAIN),
    "one step ahead": offered(async_scheduling=True),
    "one at a time": dict(max_num_seqs=1),
    "chunks of 5": dict(max_num_batched_tokens=5),
    "preempted, ahead": offered(num_kvcache_blocks=8, kvcache_block_size=16, async_scheduling=True),
    **({} if ON_GPU else {"two ranks": dict(tensor_parallel_size=2)}),
}


def params(**asked) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 60, "temperature": 0.9, **asked})


REQUESTS = [
    ("Once upon a time", params(json_schema=SCHEMA, seed=1)),
    ("The fox", params(temperature=0, max_tokens=20)),  # asks for nothing, in the same batch
    ("A girl named", params(logit_bias={300: 3.5, 17: -100, 9: 1.5}, seed=2, max_tokens=20)),
    ("x", params(grammar='start: "yes" | "no" | "may" "be"+', seed=3, max_tokens=12)),
    ("Once upon a time", params(json_schema={}, logit_bias={93: 2.0}, seed=4, top_k=30)),
    ("The dog said", params(json_schema=SCHEMA, temperature=0, frequency_penalty=0.3)),
]


def answers(llm: LLM, requests=REQUESTS) -> list[dict]:
    prompts, asked = zip(*requests)
    return llm.generate(list(prompts), list(asked), use_tqdm=False)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Each request's tokens, alone in an engine without anything else."""
    llm = build(dtype="float32", **PLAIN)
    found = [answers(llm, [request])[0]["token_ids"] for request in REQUESTS]
    llm.exit()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_do_not_depend_on_the_way(way, expected):
    llm = build(dtype="float32", **WAYS[way])
    assert [output["token_ids"] for output in answers(llm)] == expected
    llm.exit()


@pytest.mark.skipif(ON_GPU, reason="on a GPU all that is above is replayed")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_replayed_step_asks_for_its_logits_anew(tmp_path):
    shape = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    folder, found = str(save_random(tmp_path, shape)), []
    prompts = random_prompts((3, 9, 2, 5), 64, seed=7)
    asked = [
        params(logit_bias={7: 2.0, 30: -100}, seed=1, max_tokens=4, ignore_eos=True),
        params(temperature=0, max_tokens=4, ignore_eos=True),
        params(logit_bias={11: 1.5}, temperature=0, max_tokens=4, presence_penalty=1.0),
        params(top_k=5, seed=2, max_tokens=4, ignore_eos=True),
    ]
    for backend in ("torch", "triton"):
        with interpreted() if backend == "triton" else nullcontext():
            options = dict(attention_backend=backend, kvcache_block_size=16, num_kvcache_blocks=20)
            llm = build(folder, dtype="float32", async_scheduling=True, **options)
            if backend == "triton":
                record(llm, sizes=(12, 24), most=16, mixed=(24,))
            outputs = llm.generate(prompts, asked, use_tqdm=False)
            found.append([output["token_ids"] for output in outputs])
            if backend == "triton":
                assert len(replays(llm)) >= 2
            llm.exit()
    assert found[0] == found[1]


def test_what_ends_by_itself_follows_its_schema():
    llm, dice = build(), random.Random(0)
    asked = [params(json_schema=SCHEMA, seed=dice.randrange(99), max_tokens=90) for _ in range(12)]
    ended = 0
    for output in answers(llm, [("Tell me", one) for one in asked]):
        if output["finish_reason"] == "stop":
            found = json.loads(output["text"])
            assert set(found) == {"name", "age", "tags"} and found["age"] in (1, 20, 300)
            assert len(found["name"]) <= 8 and all(type(tag) is bool for tag in found["tags"])
            ended += 1
    assert ended >= 6, "too few ended to say anything"
    llm.exit()


def test_a_bias_is_added_before_a_token_is_drawn(tmp_path):
    """By the definition: the greedy token of logits + bias."""
    from transformers import AutoModelForCausalLM

    folder = save_random(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    llm, bias = build(str(folder), dtype="float32"), {5: 0.05, 6: -0.05, 319: 0.1, 0: 100.0}
    for held in (dict(list(bias.items())[:3]), bias):
        for prompt in random_prompts((3, 20), 320, seed=4):
            asked = params(temperature=0, max_tokens=8, ignore_eos=True, logit_bias=held)
            tokens = list(prompt)
            with torch.inference_mode():
                for _ in range(8):
                    logits = model(torch.tensor([tokens])).logits[0, -1]
                    for token, value in held.items():
                        logits[token] += value
                    tokens.append(int(logits.argmax()))
            assert llm.generate([prompt], asked, use_tqdm=False)[0]["token_ids"] == tokens[-8:]
    llm.exit()


def test_after_a_complete_text_only_the_end_may_follow():
    llm = build()
    asked = params(grammar='start: "no"', max_tokens=9, ignore_eos=True)
    (output,) = answers(llm, [("x", asked)])
    eos = llm.tokenizer.eos_token_id
    tokens = output["token_ids"]
    assert output["text"] == "no" and set(tokens[tokens.index(eos) :]) == {eos}
    llm.exit()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(logit_bias={99999: 1.0}), "logit_bias"),
        (dict(logit_bias={-1: 1.0}), "logit_bias"),
        (dict(logit_bias={"5": 1.0}), "logit_bias"),
        (dict(logit_bias={5: 101.0}), "logit_bias"),
        (dict(logit_bias={5: float("nan")}), "logit_bias"),
        (dict(json_schema={"type": "nonsense"}), "json_schema"),
        (dict(json_schema={"$ref": "#/nowhere"}), "json_schema"),
        (dict(grammar="start: nothing"), "grammar"),
        (dict(grammar="x" * 200_000), "grammar"),
    ],
)
def test_a_bad_wish_is_refused_before_any_work(asked, words):
    llm = build()
    with pytest.raises(ValueError, match=words):
        llm.add_request("x", params(**asked))
    assert llm.is_finished()
    llm.exit()


def test_a_grammar_and_a_schema_do_not_go_together():
    llm = build()
    with pytest.raises(ValueError, match="json_schema and grammar"):
        llm.add_request("x", params(json_schema={}, grammar='start: "a"'))
    llm.exit()

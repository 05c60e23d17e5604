"""Greedy tokens equal those of Hugging Face transformers, in float32 on the CPU."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams

VOCAB = 160
PROMPT_LENS = (1, 2, 9, 33)
NUM_NEW = 24
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
)
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}
SHAPES = {
    "group-1-untied": dict(num_key_value_heads=4),
    "group-2-tied": dict(tie_word_embeddings=True),
    "group-3": dict(num_attention_heads=6, num_key_value_heads=2),
    "group-8-one-kv-head": dict(num_attention_heads=8, num_key_value_heads=1),
    "head-dim-not-hidden-over-heads": dict(head_dim=32),
    "odd-sizes": dict(hidden_size=40, intermediate_size=56, head_dim=24, num_hidden_layers=2),
    "attention-bias": dict(attention_bias=True),
    "rope-theta-1e6": dict(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    "rope-linear": dict(
        rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 3.0}
    ),
    "rope-yarn": dict(rope_parameters={**YARN, "original_max_position_embeddings": 32}),
    "rope-yarn-attention-factor": dict(
        rope_parameters={
            **YARN,
            "original_max_position_embeddings": 32,
            "attention_factor": 0.8,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        }
    ),
    "large-eps": dict(rms_norm_eps=0.01),
}


def save_random_model(folder, shard: bool = False, **changes) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, no two alike and none 0 or 1, saved by transformers."""
    torch.manual_seed(len(str(changes)))
    model = Qwen3ForCausalLM(Qwen3Config(**{**BASE, **changes})).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name else 0.0
            parameter.normal_(center, 0.3 if parameter.dim() == 1 else 0.2)
    model.save_pretrained(folder, max_shard_size="20KB" if shard else "1GB")
    return model


@torch.inference_mode()
def expected_tokens(model, prompt: list[int], num_new: int) -> list[int]:
    """Greedy tokens by running the whole text each time; the top two must not be close."""
    tokens = list(prompt)
    for _ in range(num_new):
        best, second = model(torch.tensor([tokens])).logits[0, -1].topk(2).values
        assert best - second > 1e-4, "a bad fixture: the two best tokens are too close"
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def check(folder, model, prompt_lens=PROMPT_LENS, num_new=NUM_NEW) -> None:
    """All prompts at once, and each alone, give the reference's tokens."""
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.vocab_size
    prompts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in prompt_lens]
    expected = [expected_tokens(model, prompt, num_new) for prompt in prompts]
    llm = LLM(str(folder), dtype="float32", device="cpu")
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    together = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    assert together == expected
    alone = [llm.generate(p, params, use_tqdm=False)[0]["token_ids"] for p in prompts[:2]]
    assert alone == expected[:2]
    llm.exit()


@pytest.mark.parametrize("name", SHAPES)
def test_random_shape_gives_the_tokens_of_transformers(name, tmp_path):
    check(tmp_path, save_random_model(tmp_path, **SHAPES[name]))


def test_sharded_weights_give_the_tokens_of_transformers(tmp_path):
    model = save_random_model(tmp_path, shard=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(tmp_path, model)


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
def test_flat_rope_theta_is_honoured(scaling, tmp_path):
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    if scaling:
        rope = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    model = save_random_model(tmp_path, rope_parameters=rope)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config.update(rope_theta=1e6, rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(config))
    check(tmp_path, model)


def test_bundled_model_gives_the_tokens_of_transformers(bundled, llm):
    model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    prompts = ["Once upon a time", "One day, Tom", "The fox", "Hello"]
    ids = [llm.tokenizer.encode(prompt) for prompt in prompts]
    expected = []
    for prompt in ids:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(out[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    assert [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)] == expected

"""A mistake is a ValueError that names it, before any work; the engine goes on as before."""

import json
import shutil

import numpy as np
import pytest
import torch
from device import build
from results import results
from safetensors.torch import load_file, save_file

from nanovllm import SamplingParams

GOOD = SamplingParams


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(max_tokens=0), "max_tokens.*0"),
        (dict(max_tokens=1.5), "max_tokens.*1.5"),
        (dict(temperature=-0.1), "temperature.*-0.1"),
        (dict(temperature=float("nan")), "temperature.*nan"),
        (dict(temperature=float("inf")), "temperature.*inf"),
        (dict(temperature="hot"), "temperature.*hot"),
        (dict(temperature=10**400), "temperature must be a finite number"),
        (dict(top_p=0), "top_p.*0"),
        (dict(top_p=1.1), "top_p.*1.1"),
        (dict(top_p=float("nan")), "top_p.*nan"),
        (dict(top_k=-1), "top_k.*-1"),
        (dict(seed="x"), "seed.*x"),
        (dict(seed=2**63), "seed.*9223372036854775808"),
        (dict(top_k=10**30), "top_k"),
        (dict(stop=""), "stop"),
        (dict(stop=[3]), "stop.*3"),
        (dict(stop_token_ids=["a"]), "stop_token_ids.*a"),
        (dict(stop_token_ids=[np.float32(3)]), "stop_token_ids.*3.0"),
        (dict(stop_token_ids=[np.bool_(True)]), "stop_token_ids.*True"),
        (dict(max_tokens=np.float32(3)), "max_tokens.*3.0"),
        (dict(max_tokens=np.int64(0)), "max_tokens.*0"),
        (dict(top_k=np.bool_(True)), "top_k.*True"),
        (dict(temperature=np.float64("nan")), "temperature.*nan"),
        (dict(ignore_eos=1), "ignore_eos.*1"),
    ],
)
def test_bad_sampling_params_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        SamplingParams(**options)


@pytest.mark.parametrize("change", [dict(max_tokens=0), dict(stop="x"), dict(temperature=0)])
def test_checked_sampling_params_stay_as_they_are(change):
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1])
    for name, value in change.items():
        with pytest.raises(AttributeError):
            setattr(params, name, value)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1,))
    assert params == SamplingParams(stop=("a", "b"), stop_token_ids=(1,))


@pytest.mark.parametrize(
    ("prompts", "params", "named"),
    [
        ("", None, "empty"),
        ([[]], None, "empty"),
        ([[1], []], None, "empty"),
        ([[1, 10**6]], None, str(10**6)),
        ([[1, -1]], None, "-1"),
        ([[1, 2.5]], None, "2.5"),
        ([[True]], None, "True"),
        ([[np.bool_(True)]], None, "True"),
        ([[np.float32(5)]], None, "5.0"),
        (np.array([1.0, 2.5]), None, "1.0"),
        (np.array([True]), None, "True"),
        (np.array([], dtype=np.int64), None, "empty"),
        (np.array([[1, 2]]), None, "1, 2"),
        ([np.array([[1, 2]])], None, "1, 2"),
        ([[np.int64(1), np.int64(1536)]], None, "1536"),
        (7, None, "7"),
        ([7.5], None, "7.5"),
        ([1, 2.5], None, "2.5"),
        ([1, None], None, "None"),
        (["Hello", 5], None, "5"),
        ("Hello \ud800", None, "ud800"),
        ([None], None, "None"),
        ([[1] * 4097], None, "4097.*4096"),
        ([[1] * 4096], GOOD(max_tokens=None), "4096 tokens.*None.*4096"),
        ([[1] * 4000], GOOD(max_tokens=97), "4000.*97.*4096"),
        (["Hello"], [GOOD(), GOOD()], "1 prompts.*2"),
        (["Hello", "Hello"], [GOOD()], "2 prompts.*1"),
        (["Hello"], "greedy", "greedy"),
        ([], [GOOD()], "0 prompts.*1"),
        (["Hello", ""], None, "empty"),
        (["Hello", [1, 1536]], None, "1536"),
        (b"Hello", None, "Hello"),
        ({"prompt": "Hello"}, None, "Hello"),
        ([[[1]]], None, r"\[1\]"),
        ([["Hello"]], None, "Hello"),
        (None, None, "None"),
        (["Hello"], GOOD(stop_token_ids=[10**6]), str(10**6)),
    ],
)
def test_bad_request_is_refused_and_nothing_is_left(llm, prompts, params, named):
    greedy = SamplingParams(temperature=0, max_tokens=5)
    before = results(llm.generate("Hello", greedy, use_tqdm=False))
    with pytest.raises(ValueError, match=named):
        llm.generate(prompts, params, use_tqdm=False)
    assert llm.is_finished()
    assert results(llm.generate("Hello", greedy, use_tqdm=False)) == before


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ("Hello", "Hello"),
        (None, "None"),
        (5, "5"),
        ([], r"\[\]"),
        ([[]], r"\[\]"),
        (["Hello"], "Hello"),
        ([["Hello"]], "Hello"),
        ([{"role": "user"}], "{'role': 'user'}"),
        ([{"content": "Hello"}], "{'content': 'Hello'}"),
        ([{"role": "user", "content": 5}], "5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text"),
        ([{"role": "user", "content": [{"text": "Hello"}]}], "None"),
        ([{"role": "user", "content": ["Hello"]}], "Hello"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "5"),
        ([{"role": None, "content": "Hello"}], "None"),
        ([{"role": "user", "content": "Hello"}, "then"], "then"),
        ([{"role": "user", "content": "Hello"}, [{"role": "user", "content": "x"}]], "x"),
        ([[{"role": "user", "content": "Hello"}], {"role": "user", "content": "x"}], "x"),
        ([[[{"role": "user", "content": "Hello"}]]], "Hello"),
        ([{"role": "user", "content": "\udc80"}], "udc80"),
    ],
)
def test_bad_messages_are_refused_and_nothing_is_left(llm, messages, named):
    greedy = SamplingParams(temperature=0, max_tokens=5)
    with pytest.raises(ValueError, match=named):
        llm.chat(messages, use_tqdm=False)
    assert llm.is_finished()
    good = [{"role": "user", "content": "Hello"}]
    assert len(llm.chat([good, good], greedy, use_tqdm=False)) == 2


@pytest.mark.parametrize("settings", [5, [], {"tokenize": True}, {5: 5}, {"chat_template": "{{"}])
def test_bad_chat_template_kwargs_are_refused(llm, settings):
    with pytest.raises(ValueError, match="chat template"):
        llm.chat([{"role": "user", "content": "Hello"}], chat_template_kwargs=settings)
    assert llm.is_finished()


def test_bad_stream_is_refused_at_the_call(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.stream("")
    assert llm.is_finished()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(max_modellen=5), "max_modellen.*max_model_len"),
        (dict(max_model_len=0), "max_model_len.*0"),
        (dict(max_model_len="long"), "max_model_len.*long"),
        (dict(device="tpu"), "device.*tpu"),
        (dict(device="cuda:99"), "cuda:99"),
        (dict(dtype="int8"), "dtype.*int8"),
        (dict(load_format="pickle"), "load_format.*pickle"),
        (dict(model="no/such/folder"), "no/such/folder"),
        (dict(model="./nowhere"), "nowhere"),
        (dict(model="nobody/nothing"), "nobody/nothing"),
        (dict(model=5), "model.*5"),
        (dict(tensor_parallel_size=3), "tensor_parallel_size.*3"),
        (dict(tensor_parallel_size=0), "tensor_parallel_size.*0"),
        (dict(max_model_len=4097), "max_model_len=4097.*4096"),
    ],
)
def test_bad_engine_option_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        build(**options)


@pytest.fixture
def checkpoint(bundled, tmp_path):
    """A copy of the bundled model that a test may break."""
    folder = tmp_path / "model"
    shutil.copytree(bundled, folder)
    return folder


def edit_config(folder, drop=None, **changes):
    """Change fields of config.json, or take one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config.pop(drop, None)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def with_config(**changes):
    return lambda folder: edit_config(folder, **changes)


def with_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def in_parts(damage):
    """The same damage to a checkpoint that has no model.safetensors, which would go first."""

    def both(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        damage(folder)

    return both


NORM = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
BREAKAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "missing field": (lambda f: edit_config(f, drop="hidden_size"), "hidden_size"),
    "another architecture": (
        lambda f: edit_config(f, architectures=["GemmaForCausalLM"], model_type="gemma"),
        "GemmaForCausalLM.*Qwen3ForCausalLM",
    ),
    "unknown rope": (
        lambda f: edit_config(f, rope_parameters={"rope_theta": 1e4, "rope_type": "longrope"}),
        "longrope",
    ),
    "sliding window": (lambda f: edit_config(f, use_sliding_window=True), "sliding_window"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), NORM),
    "misshapen tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: t[NORM][1:]})),
        NORM + ".*shape",
    ),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "pointer in place of weights": (
        lambda f: (f / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "model.safetensors",
    ),
    "pickle alone": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "no .*safetensors",
    ),
    "shard missing": (
        in_parts(with_file(INDEX, b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')),
        "model-00001-of-00002",
    ),
    "broken generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json.*not valid JSON",
    ),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), "gelu"),
    "two architectures": (
        lambda f: edit_config(f, architectures=["Qwen3ForCausalLM", "Qwen3ForCausalLM"]),
        "architectures",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        NORM + ".*int8",
    ),
    "a folder in place of weights": (
        in_parts(lambda f: (f / "more.safetensors").mkdir()),
        "more.safetensors",
    ),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:5000]
        ),
        "model.safetensors",
    ),
}


for name, value in {
    "hidden_size": None,
    "intermediate_size": 384.0,
    "num_hidden_layers": 0,
    "vocab_size": -1,
    "attention_bias": None,
    "num_attention_heads": True,
    "num_key_value_heads": 3,
    "head_dim": [64],
    "max_position_embeddings": {},
    "rms_norm_eps": "1e-6",
    "tie_word_embeddings": "yes",
    "eos_token_id": "</s>",
    "quantization_config": {"quant_method": "fp8"},
    "architectures": "Qwen3ForCausalLM",
    "model_type": "qwen2",
    "rope_parameters": "yarn",
    "rope_scaling": [2],
}.items():
    BREAKAGES[f"{name}={value!r}"] = (with_config(**{name: value}), rf"config\.json.*{name}")
for rope, named in (
    ({"rope_theta": "1e4"}, "rope_theta"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "linear", "factor": "2"}, "factor"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "original_max_position"),
    ({"rope_type": "yarn", "factor": 0}, "factor"),
    ({"rope_type": "yarn", "factor": 2, "beta_fast": [32]}, "beta_fast"),
):
    BREAKAGES[str(rope)] = (with_config(rope_parameters=rope), rf"config\.json.*{named}")
for content in (b"[1]", b"null", b"", b"{", b"\xff\xfe\x00", b"[" * 100_000):
    for name in ("config.json", "generation_config.json", INDEX):
        damage = with_file(name, content)
        damage = in_parts(damage) if name == INDEX else damage
        BREAKAGES[f"{name} of {content[:9]}"] = (damage, name)
for content in (b"{}", b'{"weight_map": [1]}', b'{"weight_map": {"a": 1}}'):
    damage = in_parts(with_file(INDEX, content))
    BREAKAGES[f"{INDEX} of {content}"] = (damage, f"{INDEX}.*weight_map")
for name in ("tokenizer.json", "tokenizer_config.json"):
    for content in (b"{", b"[]", b"\xff"):
        BREAKAGES[f"{name} of {content}"] = (with_file(name, content), name)


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_checkpoint_is_named(breakage, checkpoint):
    damage, named = BREAKAGES[breakage]
    damage(checkpoint)
    with pytest.raises(ValueError, match=named):
        build(checkpoint)


def test_a_tokenizer_that_cannot_be_read_is_told_before_the_weights_load(checkpoint):
    """Minutes may lie between the two."""
    (checkpoint / "tokenizer.json").write_bytes(b"{")
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="tokenizer.json"):
        build(checkpoint)


def test_text_needs_a_tokenizer_and_token_ids_do_not(checkpoint):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    llm = build(checkpoint)
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate("Hello")
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate([[5]], SamplingParams(stop="x"))
    assert len(llm.generate([[5]], SamplingParams(max_tokens=3), use_tqdm=False)) == 1


def test_dummy_weights_need_a_config_alone(checkpoint):
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            file.unlink()
    llm = build(checkpoint, load_format="dummy")
    out = llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(out[0]["token_ids"]) == 3

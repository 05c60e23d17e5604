"""Every architecture gives the greedy tokens of transformers, however its requests are run."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import SMALL, random_prompts, reference_tokens
from device import DEVICE
from families import EACH, FAMILIES, save_each, save_family
from memory import check_empty

from nanovllm import LLM, SamplingParams
from nanovllm.config import ModelConfig
from nanovllm.models import MODELS
from nanovllm.utils.checkpoint import ARCHITECTURES

EVERY = [(family, name) for family in FAMILIES for name in FAMILIES[family]]
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = (1, 2, 7, 33, 100)
IN_BLOCKS = dict(kvcache_block_size=16, num_kvcache_blocks=60)
WAYS = {
    "one after the other": dict(max_num_seqs=1),
    "in chunks": dict(max_num_batched_tokens=24, max_num_seqs=24),
    "preempted": dict(num_kvcache_blocks=9),
    "one step ahead": dict(async_scheduling=True),
    "all of it": dict(max_num_batched_tokens=24, num_kvcache_blocks=9, async_scheduling=True),
}


def tokens(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    check_empty(llm)
    return [out["token_ids"] for out in outputs]


def prompts_with_shared_beginnings(vocab_size: int) -> list[list[int]]:
    prompts = random_prompts((3, 40, 1, 17, 40, 90), vocab_size, seed=130)
    prompts[4] = prompts[1][:32] + prompts[3][:8]
    return prompts


@pytest.fixture(scope="module", params=EACH)
def each(request, tmp_path_factory):
    """(folder, prompts, what transformers answers) of each architecture."""
    folder, vocab_size = save_each(tmp_path_factory.mktemp(request.param), request.param)
    prompts = prompts_with_shared_beginnings(vocab_size)
    return folder, prompts, [reference_tokens(folder, prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_every_shape_gives_the_tokens_of_transformers(family, name, tmp_path, make_llm):
    folder = save_family(tmp_path, family, name)
    prompts = random_prompts(LENGTHS, SMALL["vocab_size"])
    expected = [reference_tokens(folder, prompt, NUM_TOKENS) for prompt in prompts]
    assert len({t for row in expected for t in row}) > 10, "a bad fixture: too few tokens"
    llm = make_llm(folder)
    assert tokens(llm, prompts) == expected
    assert [tokens(llm, [prompt])[0] for prompt in prompts] == expected


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_run_requests_changes_a_token(each, way, make_llm):
    """Twice: the second time with what is in the cache."""
    folder, prompts, expected = each
    llm = make_llm(folder, **IN_BLOCKS | WAYS[way])
    for _ in range(2):
        assert tokens(llm, prompts) == expected
    assert (llm.scheduler.num_preemptions > 0) == ("num_kvcache_blocks" in WAYS[way])
    assert llm.scheduler.block_manager.num_hit_tokens > 0


@pytest.mark.skipif(DEVICE != "cpu", reason="over gloo")
@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_give_the_tokens_of_one(each, size):
    """With chunks, preemptions and hits; a rank holds a part of each expert."""
    folder, prompts, expected = each
    options = dict(device="cpu", dtype="float32", tensor_parallel_size=size)
    llm = LLM(folder, **options, **IN_BLOCKS | WAYS["all of it"])
    for _ in range(2):
        assert tokens(llm, prompts) == expected
    llm.exit()


def test_the_tables_name_the_same_architectures():
    assert list(MODELS) == list(ARCHITECTURES)
    assert {f"{family}ForCausalLM" for family in FAMILIES} | {"Qwen3ForCausalLM"} == set(MODELS)


def test_an_unknown_architecture_is_refused_with_the_list_of_the_known(tmp_path):
    folder, _ = save_each(tmp_path, "Llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as raised:
        LLM(folder, device="cpu")
    for name in ("MistralForCausalLM", *MODELS):
        assert name in str(raised.value)


@pytest.mark.parametrize("other", ["qwen3", "llama"])
def test_an_architecture_of_another_model_type_is_refused(other, tmp_path):
    folder, _ = save_each(tmp_path, "Qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": other}))
    with pytest.raises(ValueError, match=f"model_type is '{other}'.*Qwen2ForCausalLM.*qwen2"):
        LLM(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_local_experts": None, "num_experts": None}, "num_experts"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok .*num_experts=7, got 8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"moe_intermediate_size": "24"}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
    ],
    ids=str,
)
def test_what_no_mixture_can_have_is_named(change, named, tmp_path):
    folder, _ = save_each(tmp_path, "Qwen3Moe")
    config = json.loads((folder / "config.json").read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=named):
        LLM(folder, device="cpu")


def test_an_expert_that_is_missing_is_named_as_the_checkpoint_would(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = save_each(tmp_path, "Qwen3Moe")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.experts.6.up_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 tensors are missing, first {name}$"):
        LLM(folder, device="cpu")
    save_file(tensors | {name: whole[:-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has shape"):
        LLM(folder, device="cpu")


def test_experts_that_ranks_cannot_share_are_named(tmp_path):
    folder, _ = save_each(tmp_path, "Qwen3Moe", moe_intermediate_size=22)
    with pytest.raises(ValueError, match="tensor_parallel_size=4 .*moe_intermediate_size, 22"):
        ModelConfig.from_folder(folder).shard(4)


@pytest.mark.parametrize("family", EACH)
def test_random_weights_need_config_json_alone(family, tmp_path, make_llm):
    folder, _ = save_each(tmp_path, family)
    (folder / "model.safetensors").unlink()
    llm = make_llm(folder, load_format="dummy")
    assert torch.isfinite(next(llm.model_runner.model.parameters())).all()
    assert len(tokens(llm, [[1, 2, 3]])[0]) == NUM_TOKENS

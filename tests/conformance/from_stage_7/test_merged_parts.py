"""How a checkpoint's parts reach merged matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import SMALL, save_random
from device import build
from safetensors.torch import load_file, save_file

from nanovllm.config import ModelConfig
from nanovllm.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.models import MODELS
from nanovllm.utils.loader import load_model

FILE = "model.safetensors"
PARTS = {  # each with the merged matrix that it is a part of, from top to bottom
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


@pytest.fixture
def checkpoint(tmp_path):
    """A random model whose projections have biases."""
    return save_random(tmp_path, dict(attention_bias=True))


def kinds(part: str) -> tuple[str, ...]:
    """What a checkpoint has of a part."""
    return ("weight", "bias") if part.startswith("self_attn") else ("weight",)


EVERY = [(part, kind) for part in PARTS for kind in kinds(part)]


@pytest.mark.parametrize(("part", "kind"), EVERY)
def test_a_part_that_is_missing_is_named_as_the_checkpoint_would(checkpoint, part, kind):
    tensors, name = load_file(checkpoint / FILE), f"model.layers.1.{part}.{kind}"
    del tensors[name]
    save_file(tensors, checkpoint / FILE)
    with pytest.raises(ValueError, match=rf"1 tensors are missing, first {name}$"):
        build(checkpoint)


@pytest.mark.parametrize(("part", "kind"), EVERY)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_misshapen_part_is_named_with_both_shapes(checkpoint, part, kind, change):
    """Also where it would fit into the whole."""
    tensors, name = load_file(checkpoint / FILE), f"model.layers.0.{part}.{kind}"
    right = tensors[name]
    wrong = right[:-1] if change < 0 else torch.cat([right, right[:1]])
    tensors[name] = wrong.clone()
    save_file(tensors, checkpoint / FILE)
    with pytest.raises(ValueError) as raised:
        build(checkpoint)
    for named in (name, str(list(wrong.shape)), str(list(right.shape))):
        assert named in str(raised.value)


def test_a_matrix_that_is_merged_already_is_not_taken(checkpoint):
    """Published checkpoints have the parts; the whole is a name that nothing uses."""
    tensors = load_file(checkpoint / FILE)
    parts = [tensors.pop(f"model.layers.0.mlp.{name}_proj.weight") for name in ("gate", "up")]
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = torch.cat(parts)
    save_file(tensors, checkpoint / FILE)
    with pytest.raises(ValueError, match=r"2 tensors are missing, first .*mlp\.gate_proj\.weight$"):
        build(checkpoint)


def test_parts_lie_in_their_rows(checkpoint, make_llm):
    """Weights and biases, in the order q, k, v and gate, up."""
    tensors = load_file(checkpoint / FILE)
    loaded = dict(make_llm(checkpoint).model_runner.model.named_parameters())
    for layer in range(SMALL["num_hidden_layers"]):
        for whole in set(PARTS.values()):
            parts = [part for part, owner in PARTS.items() if owner == whole]
            for kind in kinds(whole):
                rows = [tensors[f"model.layers.{layer}.{part}.{kind}"] for part in parts]
                found = loaded[f"model.layers.{layer}.{whole}.{kind}"]
                assert torch.equal(found.cpu(), torch.cat(rows))
    used = {name for name in loaded if "qkv_proj" in name or "gate_up_proj" in name}
    assert len(used) == SMALL["num_hidden_layers"] * 3, "a weight and a bias, and a weight"


def test_shards_may_part_what_is_merged(tmp_path, make_llm):
    """Each tensor in a file of its own, in an order that is not the rows'."""
    whole = make_llm(save_random(tmp_path / "whole", dict(attention_bias=True)))
    parted = make_llm(
        save_random(tmp_path / "parted", dict(attention_bias=True), max_shard_size="1KB")
    )
    found = dict(parted.model_runner.model.named_parameters())
    for name, parameter in whole.model_runner.model.named_parameters():
        assert torch.equal(parameter, found[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_half_a_model_is_loaded_by_layers_that_take_their_half(monkeypatch, checkpoint, rank):
    """Half the heads and half the MLP: rows of each part of what is merged, columns of the rest."""

    def rows(self, kind: str, stored) -> torch.Tensor:
        size = stored.get_shape()[0] // 2
        return stored[rank * size : (rank + 1) * size]

    def columns(self, kind: str, stored) -> torch.Tensor:
        if kind == "bias":
            return stored[...]
        size = stored.get_shape()[1] // 2
        return stored[:, rank * size : (rank + 1) * size]

    monkeypatch.setattr(ColumnParallelLinear, "take", rows)
    monkeypatch.setattr(QKVParallelLinear, "take", rows)
    monkeypatch.setattr(RowParallelLinear, "take", columns)
    config = ModelConfig.from_folder(checkpoint)
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    halves = {name: getattr(config, name) // 2 for name in sizes}
    model = MODELS[config.architecture](replace(config, **halves), num_positions=8)
    load_model(model.requires_grad_(False), checkpoint)
    tensors, layer = load_file(checkpoint / FILE), "model.layers.1."
    for whole in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        for kind in kinds(whole):
            parts = [part for part, owner in PARTS.items() if owner == whole]
            own = [tensors[f"{layer}{part}.{kind}"].chunk(2)[rank] for part in parts]
            assert torch.equal(model.get_parameter(f"{layer}{whole}.{kind}"), torch.cat(own))
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        own = tensors[layer + name].chunk(2, dim=1)[rank]
        assert torch.equal(model.get_parameter(layer + name), own)

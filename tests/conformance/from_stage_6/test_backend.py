"""Which attention backend an engine gets, and what is said where it can't be had."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from device import build

from nanovllm.config import Config
from nanovllm.layers.attention import choose_backend


@pytest.mark.parametrize("value", ["xformers", "Triton", "", None, 1, ["torch"]], ids=repr)
def test_an_unknown_backend_is_named(value):
    with pytest.raises(ValueError) as raised:
        build(attention_backend=value)
    assert "attention_backend" in str(raised.value) and repr(value) in str(raised.value)


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_on_a_cpu_there_are_no_kernels(name):
    with pytest.raises(ValueError, match=f"attention_backend='{name}' needs a GPU.* cpu"):
        build(device="cpu", attention_backend=name)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Make options believe in a GPU, and in the package flash-attn."""
    find_spec = importlib.util.find_spec

    def with_flash_attn(name, *args):
        return object() if name == "flash_attn" else find_spec(name, *args)

    monkeypatch.setattr(Config, "torch_device", torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", with_flash_attn)


def config(**options) -> Config:
    """Options for bfloat16, or for what they say."""
    return Config(**{"device": "cpu", "dtype": "bfloat16", **options})


@pytest.mark.parametrize("head_dim", [8, 24, 80, 96, 512])
def test_triton_names_a_head_size_that_it_can_not_do(on_a_gpu, head_dim):
    with pytest.raises(ValueError, match=rf"'triton' needs a head_dim of 16, .*got {head_dim}$"):
        choose_backend(config(attention_backend="triton"), head_dim)
    assert choose_backend(config(), head_dim) == "torch"


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_triton_is_the_choice_for_a_gpu(on_a_gpu, head_dim):
    for name in ("auto", "triton"):
        assert choose_backend(config(attention_backend=name), head_dim) == "triton"
    for name in ("torch", "flash_attn"):
        assert choose_backend(config(attention_backend=name), head_dim) == name


def test_torch_is_the_choice_for_a_cpu():
    for name in ("auto", "torch"):
        assert choose_backend(config(attention_backend=name), 64) == "torch"


@pytest.mark.parametrize(
    ("options", "head_dim", "named"),
    [
        (dict(kvcache_block_size=16), 64, "kvcache_block_size of 256.*16"),
        (dict(kvcache_block_size=255), 64, "kvcache_block_size of 256.*255"),
        (dict(kvcache_block_size=384), 64, "kvcache_block_size of 256.*384"),
        (dict(dtype="float32"), 64, "bfloat16 or float16.*float32 and 64"),
        (dict(), 20, "head_dim.*bfloat16 and 20"),
        (dict(), 512, "head_dim.*bfloat16 and 512"),
    ],
    ids=str,
)
def test_flash_attn_names_what_it_can_not_do(on_a_gpu, options, head_dim, named):
    asked = config(attention_backend="flash_attn", **options)
    with pytest.raises(ValueError, match=f"attention_backend='flash_attn' needs .*{named}"):
        choose_backend(asked, head_dim)


@pytest.mark.parametrize("size", [256, 512])
def test_flash_attn_takes_multiples_of_its_block(on_a_gpu, size):
    asked = config(attention_backend="flash_attn", kvcache_block_size=size)
    assert choose_backend(asked, 64) == "flash_attn"


def test_flash_attn_that_is_not_installed_is_named(monkeypatch, on_a_gpu):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ValueError, match="'flash_attn' needs the package flash-attn"):
        choose_backend(config(attention_backend="flash_attn"), 64)

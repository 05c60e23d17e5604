"""Which file a tensor is read from, and what is said about tensors that are not used."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import SMALL
from device import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nanovllm
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.utils import loader
from nanovllm.utils.loader import checkpoint_tensors

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(random_folder, tmp_path):
    """A small checkpoint that a test may rearrange."""
    return shutil.copytree(random_folder, tmp_path / "model")


@pytest.fixture
def tensors(folder):
    """What is in its one file."""
    return load_file(folder / "model.safetensors")


def save(folder, name, tensors) -> None:
    """Write tensors, each in memory of its own."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def loaded(folder, names=(EMBEDDING, NORM)) -> dict[str, torch.Tensor]:
    """Some tensors of the engine's model."""
    llm = build(folder, dtype="float32")
    state = llm.model_runner.model.state_dict()
    found = {name: state[name].clone().cpu() for name in names}
    llm.exit()
    return found


def same(found, expected) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("stray", ["model_ema", "adapter", "zz", "model.fp16"])
def test_a_stray_file_beside_model_safetensors_is_not_read(stray, folder, tensors):
    save(folder, f"{stray}.safetensors", {k: torch.zeros_like(t) for k, t in tensors.items()})
    assert same(loaded(folder), tensors)


def test_model_safetensors_goes_before_an_index_as_in_transformers(folder, tensors):
    save(folder, "old.safetensors", {k: torch.zeros_like(t) for k, t in tensors.items()})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    found = loaded(folder)
    assert same(found, tensors)
    assert same(found, AutoModelForCausalLM.from_pretrained(folder).float().state_dict())


@pytest.mark.parametrize("owner", ["a.safetensors", "b.safetensors"])
def test_a_tensor_is_read_from_the_file_that_the_index_names_and_from_no_other(
    owner, folder, tensors
):
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[owner]
    (folder / "model.safetensors").unlink()
    wrong = {EMBEDDING: torch.zeros_like(tensors[EMBEDDING])}
    save(folder, owner, tensors | {NORM: torch.zeros_like(tensors[NORM]), "extra": torch.ones(1)})
    save(folder, other, tensors | wrong)
    index = {"weight_map": dict.fromkeys(tensors, owner) | {NORM: other}}
    (folder / INDEX).write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asked for `extra`
        assert same(loaded(folder), tensors)


def test_a_file_that_lacks_what_the_index_says_is_in_it_is_named(folder, tensors):
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    save(folder, "a.safetensors", {EMBEDDING: tensors[EMBEDDING]})
    index = {"weight_map": dict.fromkeys(tensors, "b.safetensors") | {NORM: "a.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"a\.safetensors.*{NORM}"):
        build(folder)


def test_without_an_index_all_files_make_the_checkpoint_together(folder, tensors):
    (folder / "model.safetensors").unlink()
    save(folder, "a.safetensors", {EMBEDDING: tensors[EMBEDDING]})
    save(folder, "b.safetensors", {k: t for k, t in tensors.items() if k != EMBEDDING})
    assert same(loaded(folder), tensors)


def test_without_an_index_a_tensor_in_two_files_is_an_error_that_names_all_three(folder, tensors):
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    save(folder, "part-2.safetensors", {NORM: tensors[NORM]})
    with pytest.raises(ValueError, match=rf"{NORM} .*part-1\.safetensors.*part-2\.safetensors"):
        build(folder)


def test_tensor_that_nothing_uses_is_a_warning(folder, tensors):
    save(folder, "model.safetensors", tensors | {"model.extra": torch.zeros(3)})
    with pytest.warns(UserWarning, match="model.extra"):
        build(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lm_head_equal_to_the_tied_embedding_is_no_warning(dtype, folder, tensors):
    head = tensors[EMBEDDING].clone()
    save(folder, "model.safetensors", tensors | {"lm_head.weight": head})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(folder, dtype=dtype)


@pytest.mark.parametrize("change", ["a value", "the shape"])
def test_lm_head_that_differs_from_the_tied_embedding_is_a_warning(change, folder, tensors):
    head = tensors[EMBEDDING].clone()
    head[-1, -1] += 0.5
    head = head[:-1] if change == "the shape" else head
    save(folder, "model.safetensors", tensors | {"lm_head.weight": head})
    with pytest.warns(UserWarning, match="lm_head.weight.*tie_word_embeddings"):
        build(folder)


def test_a_layer_says_what_of_a_stored_tensor_it_takes(monkeypatch, folder, tensors):
    """It is asked with a slice, of which only what it indexes is read."""

    def other_half_first(self, kind: str, stored) -> torch.Tensor:
        assert kind == "weight" and not isinstance(stored, torch.Tensor)
        half = stored.get_shape()[1] // 2
        return torch.cat([stored[:, half:], stored[:, :half]], dim=1)

    monkeypatch.setattr(RowParallelLinear, "take", other_half_first)
    swapped = {
        name: torch.cat([*reversed(x.chunk(2, dim=1))], dim=1)
        for name, x in tensors.items()
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    assert len(swapped) == 2 * SMALL["num_hidden_layers"]
    assert same(loaded(folder, [*swapped, NORM]), tensors | swapped)


def test_a_large_checkpoint_shows_how_far_it_is_read_and_a_small_one_does_not(
    folder, monkeypatch, capfd
):
    build(folder)
    assert "Loading" not in capfd.readouterr().err
    monkeypatch.setattr(loader, "LARGE", 1000)
    build(folder)
    assert "Loading" in capfd.readouterr().err


def test_who_loads_makes_no_lock_between_processes(folder):
    """A process that was spawned has its locks tracked, and their tracker outlives it."""
    code = (
        "from nanovllm.utils import loader; from pathlib import Path; import multiprocessing, sys; "
        "from multiprocessing import resource_tracker; loader.LARGE = 1000; "
        "multiprocessing.set_start_method('spawn'); "
        "print(len(list(loader.checkpoint_tensors(Path(sys.argv[1])))), "
        "resource_tracker._resource_tracker._pid)"
    )
    package = str(Path(nanovllm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
    )
    number, tracker = done.stdout.split()
    assert int(number) > 0 and tracker == "None" and "Loading" in done.stderr


def test_what_a_layer_takes_is_not_in_memory_before_it_is_copied(folder):
    """A stored tensor is the file's pages: what is written to the file shows in it."""
    _, stored = next(checkpoint_tensors(folder))
    taken = stored[...]
    before, path = taken.clone(), folder / "model.safetensors"
    content = path.read_bytes()
    at = content.index(before.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes(4))
    assert before.view(-1)[0] != 0 and taken.view(-1)[0] == 0

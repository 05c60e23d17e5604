"""Checkpoints: where they lie, and how their tensors reach the model."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import nanovllm
from nanovllm.config import read_json
from nanovllm.layers.linear import MergedLinear

BUNDLED_MODEL = Path(nanovllm.__path__[0]) / "tiny"


def load_model(model: nn.Module, folder: Path) -> None:
    """Fill every parameter from the folder's safetensors files.

    ValueError for a tensor that is missing or does not fit; a warning for one that nothing uses.
    """
    parameters = targets(model)
    missing, unused = set(parameters), []
    for name, tensor in checkpoint_tensors(folder):
        if name not in parameters:
            unused.append(name)
            continue
        target = parameters[name]
        if tensor.shape != target.shape or not tensor.is_floating_point():
            raise ValueError(
                f"{folder}: {name} has shape {list(tensor.shape)} in {tensor.dtype}, config.json "
                f"asks for {list(target.shape)} in floating point"
            )
        target.data.copy_(tensor)
        missing.discard(name)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {min(missing)}")
    # A tied head is the embedding itself; some checkpoints store a copy of it all the same.
    unused = [name for name in unused if name != "lm_head.weight"]
    if unused:
        warnings.warn(f"{folder}: nothing uses {', '.join(sorted(unused)[:8])}", stacklevel=2)


def targets(model: nn.Module) -> dict[str, torch.Tensor]:
    """Where each tensor of a checkpoint goes: to a parameter, or to a part of a merged one."""
    found = dict(model.named_parameters())
    for path, module in model.named_modules():
        if not isinstance(module, MergedLinear):
            continue
        for kind, _ in module.named_parameters():  # weight, bias
            merged = found.pop(f"{path}.{kind}")
            parts = merged.split(list(module.output_sizes.values()))
            for name, part in zip(module.output_sizes, parts, strict=True):
                found[f"{path.rpartition('.')[0]}.{name}.{kind}"] = part
    return found


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a checkpoint with its name, from one safetensors file or from its shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ValueError(f"{index} has no weight_map of names to files")
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: there are no weights to load")
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} can't be read: {error}") from None


def find_checkpoint(model: str | None) -> Path:
    """The folder of a checkpoint: the bundled one, a local one, or one fetched from the hub.

    ValueError where there is no such folder and nothing of that name can be fetched.
    """
    if model is None:
        return BUNDLED_MODEL
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model {model!r} is not a folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r} is neither a folder nor fetched: {reason}") from None


def fill_with_noise(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's size, for speed work on a shape alone."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02, generator=generator)

"""How a checkpoint's tensors reach the model."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from nanovllm.layers.linear import MergedLinear
from nanovllm.utils.checkpoint import read_json
from nanovllm.utils.errors import as_value_error

INDEX = "model.safetensors.index.json"


def files_of_tensors(folder: Path) -> dict[str, str]:
    """Tensor name -> name of its file. ValueError where two files are as good, or there is none.

    In the order of transformers: model.safetensors alone; else the files that an index names,
    each for the tensors that the index assigns to it; else all files of the folder together.
    """
    with as_value_error(f"{folder} can't be read"):
        is_whole = (folder / "model.safetensors").is_file()
        every = sorted(path.name for path in folder.glob("*.safetensors"))
        is_sharded = not is_whole and (folder / INDEX).is_file()
    if is_sharded:
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map of names to files")
        return files
    files = {}
    for file in ["model.safetensors"] if is_whole else every:
        with as_value_error(f"{folder / file} can't be read"):
            with safe_open(folder / file, framework="pt") as tensors:
                names = list(tensors.keys())
        for name in names:
            if name in files:
                raise ValueError(f"{folder}: {name} stands in {files[name]} and in {file}")
            files[name] = file
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: there are no weights to load")
    return files


def load_model(model: nn.Module, folder: Path) -> None:
    """Fill every parameter from the folder's safetensors files.

    ValueError for a tensor that is missing or does not fit; a warning for one that nothing uses,
    and for a stored head that is not the embedding that it is tied to.
    """
    parameters = targets(model)
    missing, unused, stored_head = set(parameters), [], None
    for name, tensor in checkpoint_tensors(folder):
        if name not in parameters:
            if name == "lm_head.weight":
                stored_head = tensor  # the embedding may be yet to come
            else:
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
    if unused:
        warnings.warn(f"{folder}: nothing uses {', '.join(sorted(unused)[:8])}", stacklevel=2)
    if stored_head is not None:
        check_tied_head(model.get_parameter("lm_head.weight"), stored_head, folder)


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


def check_tied_head(head: torch.Tensor, stored: torch.Tensor, folder: Path) -> None:
    """Warn of a stored head that is not the embedding, which serves as the head when tied.

    Some checkpoints store a copy; where it is another matrix, one of two files is wrong.
    """
    if not torch.equal(head.cpu(), stored.to(head.dtype)):
        warnings.warn(
            f"{folder}: lm_head.weight differs from the embedding, which config.json ties the head "
            "to: it is not used (tie_word_embeddings=false in config.json would use it)",
            stacklevel=2,
        )


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of a checkpoint with its name, from the one file that it is to be read from."""
    files = files_of_tensors(folder)
    for file in sorted(set(files.values())):
        with as_value_error(f"{folder / file} can't be read"):
            tensors = safe_open(folder / file, framework="pt")
        for name in (name for name in files if files[name] == file):
            with as_value_error(f"{folder / file}: {name} can't be read"):
                tensor = tensors.get_tensor(name)
            yield name, tensor


def fill_with_noise(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's size, for speed work on a shape alone."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02, generator=generator)

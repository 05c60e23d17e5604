"""How a checkpoint's tensors reach the model."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import RLock
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

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


LARGE = 2**30  # bytes of a checkpoint


class Bar(tqdm):
    """A bar that is the only one: no lock between processes, and no thread."""

    _lock, monitor_interval = RLock(), 0


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Each tensor of a checkpoint with its name, from the one file that it is to be read from.

    It is a slice, of which only what is indexed is read. A progress bar counts those of a large
    checkpoint; TQDM_DISABLE=1 in the environment keeps it away.
    """
    files = files_of_tensors(folder)
    with as_value_error(f"{folder} can't be read"):
        size = sum((folder / file).stat().st_size for file in set(files.values()))
    hidden = {} if size >= LARGE else {"disable": True}
    with Bar(total=len(files), desc="Loading", unit="tensor", **hidden) as bar:
        for file in sorted(set(files.values())):
            with as_value_error(f"{folder / file} can't be read"):
                tensors = safe_open(folder / file, framework="pt")
            for name in (name for name in files if files[name] == file):
                with as_value_error(f"{folder / file}: {name} can't be read"):
                    stored = tensors.get_slice(name)
                yield name, stored
                bar.update()


def check_tied_head(model: nn.Module, stored: Any, folder: Path) -> None:
    """Warn of a stored head that is not the embedding, which serves as the head when tied.

    Some checkpoints store a copy; where it is another matrix, one of two files is wrong.
    """
    head, layer = model.get_parameter("lm_head.weight"), cast(Any, model.get_submodule("lm_head"))
    if not torch.equal(head.cpu(), layer.take("weight", stored).to(head.dtype)):
        warnings.warn(
            f"{folder}: lm_head.weight differs from the embedding, which config.json ties the head "
            "to: it is not used (tie_word_embeddings=false in config.json would use it)",
            stacklevel=2,
        )


def fill_with_noise(model: nn.Module, seed: int = 0) -> None:
    """Random weights of a trained model's size, for speed work on a shape alone."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02, generator=generator)


def load_model(model: nn.Module, folder: Path) -> None:
    """Fill every parameter from the folder's safetensors files.

    ValueError for a tensor that is missing or does not fit; a warning for one that nothing uses,
    and for a stored head that is not the embedding that it is tied to.
    """
    wanted = targets(model)
    missing, unused, stored_head = set(wanted), [], None
    for name, stored in checkpoint_tensors(folder):
        if name in wanted:
            fill(wanted[name], stored, f"{folder}: {name}")
            missing.discard(name)
        elif name == "lm_head.weight":
            stored_head = stored  # the embedding may be yet to come
        else:
            unused.append(name)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {min(missing)}")
    if unused:
        warnings.warn(f"{folder}: nothing uses {', '.join(sorted(unused)[:8])}", stacklevel=2)
    if stored_head is not None:
        check_tied_head(model, stored_head, folder)


Target = tuple[Any, str, torch.Tensor]  # a layer, one of its parameters' names, and its memory


def targets(model: Any) -> dict[str, Target]:
    """Where each tensor of a checkpoint goes: to a parameter, or to a part of a merged one."""
    found, packed = {}, model.packed_modules_mapping
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        parent, _, merged = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        parts = {
            f"{parent}.{part}.{kind}": layer.part(kind, index)
            for part, (owner, index) in packed.items()
            if owner == merged
        }
        if hasattr(layer, "stored_parts"):  # one that knows them itself
            parts = {f"{path}.{part}": memory for part, memory in layer.stored_parts(kind)}
        for part, memory in (parts or {name: parameter}).items():
            found[part] = layer, kind, memory
    return found


def fill(target: Target, stored: Any, name: str) -> None:
    """Copy what the layer takes of a stored tensor; ValueError where that does not fit."""
    layer, kind, memory = target
    with as_value_error(f"{name} can't be read"):
        own = layer.take(kind, stored)
    if own.shape != memory.shape or not own.is_floating_point():
        raise ValueError(
            f"{name} has shape {list(own.shape)} in {own.dtype}, config.json asks for "
            f"{list(memory.shape)} in floating point"
        )
    memory.data.copy_(own)

"""A checkpoint's folder: where it lies, and what its config.json says."""

import json
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import nanovllm
from nanovllm.utils.errors import as_value_error
from nanovllm.utils.options import check_options, matches

BUNDLED_MODEL = Path(nanovllm.__path__[0]) / "tiny"

# What a checkpoint is made of. A name with a folder in it matches too: chat templates are in two
# places, chat_template.jinja and additional_chat_templates/.
FETCHED = ["*.json", "*.txt", "*.jinja", "*.safetensors"]


def find_checkpoint(model: str | None) -> Path:
    """The folder of a checkpoint: the bundled one, a local one, or one fetched from the hub.

    ValueError where there is no such folder and nothing of that name can be fetched.
    """
    if model is None:
        return BUNDLED_MODEL
    with as_value_error(f"model {model!r} can't be looked up"):  # a home of nobody, no permission
        folder = Path(model).expanduser()
        if folder.is_dir():
            return folder
        is_hub_name = not folder.exists() and model.count("/") == 1
    if not is_hub_name or model.startswith((".", "/", "~")):
        raise ValueError(f"model {model!r} is not a folder")
    from huggingface_hub import snapshot_download

    with as_value_error(f"model {model!r} is neither a folder nor fetched"):
        return Path(snapshot_download(model, allow_patterns=FETCHED))


def read_json(path: Path) -> dict:
    """The JSON object in a file; empty where there is no such file. ValueError for any other."""
    with as_value_error(f"{path} can't be read"):
        if not path.is_file():
            return {}
        content = path.read_bytes()
    with as_value_error(f"{path} is not valid JSON"):
        content = json.loads(content.decode())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {content!r:.40}")
    return content


class Architecture(NamedTuple):
    """How the config.json of an architecture is to be read."""

    model_type: str
    head_dim: int | None = None  # where none is stated; None: hidden_size / num_attention_heads
    needs: tuple[str, ...] = ()  # besides what every architecture needs
    other_names: dict[str, str] = {}  # under which something may be stated -> our name for it


ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture("qwen3", head_dim=128),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "LlamaForCausalLM": Architecture("llama"),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        needs=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        other_names={"num_local_experts": "num_experts"},
    ),
}


def architecture_of(path: Path, raw: dict) -> Architecture:
    """The architecture that a config.json names; ValueError for one that is not known."""
    names, model_type = raw.get("architectures"), raw.get("model_type")
    if names not in [[name] for name in ARCHITECTURES]:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: architectures is {names!r}, this engine runs one of {known}")
    kind = ARCHITECTURES[names[0]]
    if model_type != kind.model_type:
        raise ValueError(
            f"{path}: model_type is {model_type!r}, that of {names[0]} is {kind.model_type!r}"
        )
    return kind


PLAIN = {"use_sliding_window": False, "hidden_act": "silu", "quantization_config": None}


def read_shape(folder: Path, cls: type) -> dict[str, Any]:
    """What config.json says of the dataclass's fields; ValueError for what the engine can't run."""
    path = folder / "config.json"
    raw = read_json(path)
    if not raw:
        raise ValueError(f"{folder} has no config.json, or an empty one")
    kind = architecture_of(path, raw)
    for name, value in PLAIN.items():
        if raw.get(name) not in (None, value):
            raise ValueError(f"{path}: {name}={raw[name]!r} is not supported")
    values = {spec.name: raw[spec.name] for spec in fields(cls) if spec.name in raw}
    values |= {"architecture": raw["architectures"][0]}
    values |= {name: raw[other] for other, name in kind.other_names.items() if other in raw}
    values.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    if values.setdefault("head_dim", kind.head_dim) is None:
        with as_value_error(f"{path} has no head_dim, and hidden_size / num_attention_heads"):
            values["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    values |= read_rope(path, raw) | {"eos_token_ids": read_eos(folder, raw)}
    needed = [s.name for s in fields(cls) if s.default is MISSING and s.default_factory is MISSING]
    if missing := [name for name in (*needed, *kind.needs) if name not in values]:
        raise ValueError(f"{path} does not say {', '.join(map(repr, missing))}")
    return values


def read_rope(path: Path, raw: dict) -> dict:
    """The base and the scaling of RoPE, in the old form of config.json or in the newer one."""
    rope: dict = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"{path}: {name} must be an object, got {raw[name]!r}")
        rope |= raw.get(name) or {}
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_scaling": rope}


def read_eos(folder: Path, raw: dict) -> tuple[int, ...]:
    """The tokens that end a text, of config.json and generation_config.json together."""
    generation, eos = folder / "generation_config.json", set()
    for file, content in ((folder / "config.json", raw), (generation, read_json(generation))):
        found = content.get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        if not all(e is None or type(e) is int for e in found):
            raise ValueError(f"{file}: eos_token_id must be integers, got {found!r}")
        eos.update(found)
    return tuple(sorted(eos - {None}))


def check_shape(shape: Any) -> None:
    """ValueError for a model's shape that no model can have."""
    check_options(shape)
    for spec in fields(shape):
        value = getattr(shape, spec.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value <= 0:
            raise ValueError(f"{spec.name} must be greater than 0, got {value}")
    if shape.head_dim % 2:
        raise ValueError(f"head_dim must be even, got {shape.head_dim}")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads="
            f"{shape.num_key_value_heads}, got {shape.num_attention_heads}"
        )
    check_rope(shape.rope_scaling)


ROPE_NUMBERS = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor",
)  # fmt: skip
ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def check_rope(scaling: dict) -> None:
    """ValueError for a number that is missing, or that is none."""
    needed = ROPE_NEEDS.get(str(scaling.get("rope_type", scaling.get("type"))), ())
    for name in ROPE_NUMBERS:
        value: Any = scaling.get(name)
        if value is None and name not in needed:
            continue
        if not matches(value, (float,)) or not 0 < value < math.inf:
            raise ValueError(f"RoPE's {name} must be a number above 0, got {value!r}")

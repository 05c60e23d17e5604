"""The engine's options (`Config`) and a checkpoint's shape (`ModelConfig`)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanovllm.utils.options import check_options, option, reject_unknown

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Config:
    """The engine's options; frozen once checked. A misfit raises ValueError."""

    model: str | None = option(None, "checkpoint folder or hub name (default: the bundled model)")
    max_model_len: int = option(4096, "longest prompt plus output, in tokens", minimum=2)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "data type of weights and cache", choices=("auto", *DTYPES))
    load_format: str = option(
        "auto", "dummy: random weights, from config.json alone", choices=("auto", "dummy")
    )
    seed: int | None = option(None, "seed for requests that bring none", minimum=0)
    max_num_seqs: int = option(64, "most sequences that run at once", minimum=1)

    def __post_init__(self):
        check_options(self)
        name, _, index = self.device.partition(":")
        if name not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {self.device!r} is not there: torch sees no such GPU")

    @classmethod
    def from_options(cls, **options) -> "Config":
        """A Config from keyword options; an unknown one raises ValueError."""
        reject_unknown(cls, options)
        return cls(**options)

    @property
    def torch_device(self) -> torch.device:
        """The device that "auto" stands for: the first GPU, else the CPU."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type that "auto" stands for: bfloat16 on a GPU, float32 on the CPU."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Qwen3 model, as its checkpoint's config.json states it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and generation_config.json; ValueError for what is not a Qwen3."""
        raw = read_json(folder / "config.json")
        if not raw:
            raise ValueError(f"{folder} has no config.json")
        architectures = raw.get("architectures") or [f"model_type {raw.get('model_type')!r}"]
        if raw.get("model_type") != "qwen3" or architectures != ["Qwen3ForCausalLM"]:
            raise ValueError(
                f"{folder} holds {architectures[0]}; this engine runs Qwen3ForCausalLM"
            )
        if raw.get("use_sliding_window"):
            raise ValueError(f"{folder}: use_sliding_window=true is not supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{folder}: hidden_act={raw['hidden_act']!r} is not supported")
        values = {name: raw[name] for name in cls.__slots__ if name in raw}
        values.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
        values.setdefault("head_dim", 128)
        # Since transformers 5 the base and the scaling live together in `rope_parameters`;
        # older checkpoints have a flat `rope_theta` and a `rope_scaling` that may be null.
        rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
        values["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
        values["rope_scaling"] = rope
        generation = read_json(folder / "generation_config.json")
        eos = [raw.get("eos_token_id"), generation.get("eos_token_id")]
        eos = [e for entry in eos for e in (entry if isinstance(entry, list) else [entry])]
        values["eos_token_ids"] = tuple(sorted({e for e in eos if e is not None}))
        try:
            return cls(**values)
        except TypeError as error:
            missing = str(error).split("argument", 1)[-1].lstrip("s: ")
            raise ValueError(f"{folder / 'config.json'} does not say {missing}") from None


def read_json(path: Path) -> dict:
    """The JSON object in a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None

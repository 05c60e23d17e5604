"""The engine's options (`Config`) and a checkpoint's shape (`ModelConfig`)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.utils.checkpoint import check_shape, read_shape
from nanovllm.utils.errors import as_value_error
from nanovllm.utils.options import check_options, option, reject_unknown

if TYPE_CHECKING:  # torch takes seconds to load, and a scheduler or a --help can do without
    import torch

DTYPES = ("float32", "float16", "bfloat16")


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
    seed: int | None = option(
        None,
        "seed for requests that bring none: same seed, same tokens in float32 on a CPU; on a GPU "
        "in half precision rounding may depend on the batch",
        minimum=0,
    )
    tensor_parallel_size: int = option(
        1, "GPUs, or processes on a CPU, that share the model", minimum=1
    )
    max_num_seqs: int = option(512, "most sequences that run at once", minimum=1)
    max_num_batched_tokens: int = option(16384, "most tokens in a step", minimum=1)
    kvcache_block_size: int = option(256, "tokens in a block of the cache", minimum=1)
    num_kvcache_blocks: int = option(-1, "blocks in the cache; -1: all that fit", minimum=-1)
    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory that the engine may fill", above=0, maximum=1
    )
    enable_prefix_caching: bool = option(True, "reuse what equal beginnings have in the cache")
    attention_backend: str = option(
        "auto",
        "auto: triton on a GPU, torch elsewhere",
        choices=("auto", "flash_attn", "triton", "torch"),
    )
    enforce_eager: bool = option(False, "launch kernel by kernel, without CUDA graphs")
    async_scheduling: bool | None = option(
        None, "prepare a step while the one before runs (default: on a GPU)"
    )
    batch_invariant: bool = option(
        False, "give a request the same bits whatever the batch is, on a GPU; slower"
    )

    @property
    def max_in_flight(self) -> int:
        """How many steps may have been launched and not been accounted for."""
        on_gpu = self.torch_device.type == "cuda"
        return 2 if (on_gpu if self.async_scheduling is None else self.async_scheduling) else 1

    @classmethod
    def from_options(cls, **options: Any) -> "Config":
        """A Config from keyword options; an unknown one raises ValueError."""
        reject_unknown(cls, options)
        return cls(**options)

    def __post_init__(self) -> None:
        check_options(self)
        name, _, index = self.device.partition(":")
        if name not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if name == "cuda":
            import torch

            if int(index or 0) >= torch.cuda.device_count():
                raise ValueError(f"device {self.device!r} is not there: torch sees no such GPU")

    @property
    def torch_device(self) -> "torch.device":
        """The device that "auto" stands for: the first GPU, else the CPU."""
        import torch

        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The data type that "auto" stands for: bfloat16 on a GPU, float32 on the CPU."""
        import torch

        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32


SHARDED = ("num_attention_heads", "intermediate_size", "moe_intermediate_size")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model, as its checkpoint's config.json states it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    architecture: str = "Qwen3ForCausalLM"  # the name of its class
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    mlp_bias: bool = False
    num_experts: int | None = None  # of a mixture; this and the next two go together
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        check_shape(self)
        if (self.num_experts_per_tok or 0) > (self.num_experts or 0):
            raise ValueError(
                f"num_experts_per_tok must be at most num_experts={self.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read config.json and generation_config.json; ValueError for what can't be run."""
        values = read_shape(folder, cls)
        with as_value_error(f"{folder / 'config.json'}"):
            return cls(**values)

    @property
    def longest(self) -> int:
        """How many tokens the positions reach: where RoPE is stretched, more than was trained.

        Qwen3 with YaRN: 32,768 original positions times 4, though max_position_embeddings says
        40,960. Without a factor, YaRN stretches the original positions to max_position_embeddings.
        """
        longest, scaling = self.max_position_embeddings, self.rope_scaling
        kind = scaling.get("rope_type", scaling.get("type"))
        factor = scaling.get("factor")
        if factor is None or kind not in ("linear", "yarn"):
            return longest
        trained = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
        # Bounded, for config.json may hold any factor.
        return max(longest, int(min((trained or longest) * factor, 2**31)))

    def fit(self, max_model_len: int, is_asked: bool) -> int:
        """max_model_len, or less where the model ends before it and nobody asked for it.

        ValueError where the caller asked for what the model can't reach.
        """
        if is_asked and max_model_len > self.longest:
            raise ValueError(
                f"max_model_len={max_model_len} is more than this model reaches: {self.longest} "
                f"tokens, by config.json's max_position_embeddings and RoPE scaling"
            )
        return min(max_model_len, self.longest)

    def with_eos(self, token_id: int | None) -> "ModelConfig":
        """The same with one more end-of-sequence token: a tokenizer names one, too."""
        eos = self.eos_token_ids if token_id is None else {*self.eos_token_ids, token_id}
        return replace(self, eos_token_ids=tuple(sorted(eos)))

    def shard(self, size: int) -> "ModelConfig":
        """The shape of one rank's part among `size`; ValueError where it does not divide."""
        kv_heads = self.num_key_value_heads
        whole = {name: getattr(self, name) for name in SHARDED if getattr(self, name) is not None}
        for name, number in whole.items():
            if number % size:
                raise ValueError(
                    f"tensor_parallel_size={size} does not divide the model's {name}, {number}"
                )
        if max(kv_heads, size) % min(kv_heads, size):
            raise ValueError(
                f"tensor_parallel_size={size} and the model's num_key_value_heads, {kv_heads}, "
                "do not divide each other"
            )
        own = {name: number // size for name, number in whole.items()}
        return replace(self, num_key_value_heads=max(1, kv_heads // size), **own)

    def mlp_weights(self, num_tokens: int | None = None) -> float:
        """Weights of a layer's MLP: those that one token takes, or that so many tokens read.

        Of a mixture these are the router's and those of the experts. Tokens that choose evenly and
        independently leave an expert unread with a chance of (1 - top / number) ** num_tokens.
        """
        number, taken = self.num_experts, float(self.num_experts_per_tok or 0)
        if number is None:
            return 3 * self.hidden_size * self.intermediate_size
        if num_tokens is not None:
            taken = number * (1 - (1 - taken / number) ** num_tokens)
        return self.hidden_size * (number + 3 * taken * (self.moe_intermediate_size or 0))

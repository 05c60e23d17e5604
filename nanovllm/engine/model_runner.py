"""Runs the model: sequences in, one new token for each out."""

from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanovllm.config import Config, ModelConfig
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import Sampler, SamplingTensors
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.context import Context, set_context
from nanovllm.utils.loader import fill_with_noise, load_model

# Without cuDNN's: it plans anew for every shape that it has not met, which takes longer than the
# step, and a text that grows brings a new shape with every token.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Create parameters in `dtype`; the previous default comes back afterwards."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


# input_ids [num_tokens], positions [num_tokens], and what attention has to know of them
Prepared = tuple[torch.Tensor, torch.Tensor, Context]


class ModelRunner:
    """Owns the model, its device and its memory."""

    def __init__(self, config: Config, model_config: ModelConfig, folder: Path, max_model_len: int):
        self.device = config.torch_device
        self.model_config = model_config
        with self.device, default_dtype(config.torch_dtype):
            self.model = Qwen3ForCausalLM(model_config, num_positions=max_model_len)
        self.model.requires_grad_(False).eval()
        if config.load_format == "dummy":
            fill_with_noise(self.model)
        else:
            load_model(self.model, folder)
        self.sampler = Sampler()

    @torch.inference_mode()
    def run(self, seqs: list[Sequence]) -> list[int]:
        """One new token id for each sequence."""
        with sdpa_kernel(SDPA_BACKENDS):
            logits = self.forward(seqs)
        token_ids = self.sampler(logits, self.prepare_sample(seqs))
        return token_ids.tolist()  # the one place where the host waits for the device

    def forward(self, seqs: list[Sequence]) -> torch.Tensor:
        """Logits of each sequence's next token, [num_seqs, vocab_size]."""
        is_prefill = seqs[0].num_computed_tokens == 0
        prepare = self.prepare_prefill if is_prefill else self.prepare_decode
        input_ids, positions, context = prepare(seqs)
        with set_context(context):
            hidden = self.model(input_ids, positions)
        if is_prefill:
            hidden = hidden[[end - 1 for end in context.cu_seqlens[1:]]]  # the last of each prompt
        return self.model.compute_logits(hidden)

    def prepare_sample(self, seqs: list[Sequence]) -> SamplingTensors:
        """The sequences' sampling parameters, as tensors on the device."""
        params = [seq.params for seq in seqs]
        return SamplingTensors(
            temperatures=self.tensor([p.temperature for p in params], torch.float32),
            top_ks=self.tensor([p.top_k for p in params]),
            top_ps=self.tensor([p.top_p for p in params], torch.float32),
            seeds=self.tensor([seq.seed for seq in seqs]),
            positions=self.tensor([len(seq) for seq in seqs]),
            all_greedy=all(p.temperature == 0 for p in params),
            any_filtered=any(p.top_k > 0 or p.top_p < 1 for p in params),
        )

    def tensor(self, values, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Host values as a tensor on the device, without waiting for the copy."""
        pinned = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)

    def prepare_prefill(self, seqs: list[Sequence]) -> Prepared:
        """A new batch: all tokens of all prompts, one after another."""
        self.allocate_kv_cache(seqs)
        cu_seqlens = [0, *accumulate(len(seq) for seq in seqs)]
        positions = [position for seq in seqs for position in range(len(seq))]
        slots = [row * self.row_len + i for row, seq in enumerate(seqs) for i in range(len(seq))]
        context = Context(slot_mapping=self.tensor(slots), cu_seqlens=cu_seqlens)
        input_ids = self.tensor([token_id for seq in seqs for token_id in seq.token_ids])
        return input_ids, self.tensor(positions), context

    def allocate_kv_cache(self, seqs: list[Sequence]) -> None:
        """A row for each sequence of a batch, each as long as the longest may become."""
        self.kv_cache = None  # the last batch's cache goes first
        self.row_len = max(seq.num_prompt_tokens + seq.params.max_tokens for seq in seqs)
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        heads = (self.model_config.num_key_value_heads, self.model_config.head_dim)
        # [key or value, layer, row, position, head, channel]; zeros, for a masked NaN is a NaN
        shape = (2, len(layers), len(seqs), self.row_len, *heads)
        dtype = self.model.lm_head.weight.dtype
        self.kv_cache = torch.zeros(shape, dtype=dtype, device=self.device)
        for layer, k_cache, v_cache in zip(layers, *self.kv_cache, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache

    def prepare_decode(self, seqs: list[Sequence]) -> Prepared:
        """The newest token of each sequence."""
        input_ids = self.tensor([seq.last_token for seq in seqs])
        positions = self.tensor([len(seq) - 1 for seq in seqs])
        rows = torch.arange(len(seqs), device=self.device)
        max_context_len = max(map(len, seqs))
        mask = None
        if len(seqs) > 1:
            mask = torch.arange(max_context_len, device=self.device) <= positions.unsqueeze(1)
            mask = mask[:, None, None]
        slots = rows * self.row_len + positions
        return input_ids, positions, Context(slots, mask=mask, max_context_len=max_context_len)

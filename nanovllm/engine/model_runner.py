"""Runs the model: sequences in, one new token for each out."""

from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
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


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.zeros; on a CPU no page of it takes memory before it is used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    data = np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


CPU_CACHE_BYTES = 2**30  # for a larger cache on a CPU set num_kvcache_blocks


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
        self.allocate_kv_cache(config)

    @torch.inference_mode()
    def run(self, seqs: list[Sequence]) -> list[int]:
        """One new token id for each sequence."""
        with sdpa_kernel(SDPA_BACKENDS):
            logits = self.forward(seqs)
        token_ids = self.sampler(logits, self.prepare_sample(seqs))
        return token_ids.tolist()  # the one place where the host waits for the device

    def forward(self, seqs: list[Sequence]) -> torch.Tensor:
        """Logits of each sequence's next token, [num_seqs, vocab_size]."""
        is_prefill = any(
            seq.num_computed_tokens == 0 or len(seq) - seq.num_computed_tokens > 1 for seq in seqs
        )
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
        """The scheduled tokens, sequence after sequence, those that bring one token first."""
        input_ids, positions, slots, cu_seqlens, context_lens = [], [], [], [0], []
        for seq in seqs:
            start = seq.num_computed_tokens
            stop = start + seq.num_scheduled_tokens
            input_ids += seq.token_ids[start:stop]
            positions += range(start, stop)
            slots += self.slots(seq, start, stop)
            cu_seqlens.append(cu_seqlens[-1] + stop - start)
            context_lens.append(stop)
        num_decodes = sum(seq.num_scheduled_tokens == 1 for seq in seqs)
        context = Context(
            slot_mapping=self.tensor(slots),
            block_tables=self.block_tables(seqs),
            context_lens=context_lens,
            mask=self.decode_mask(context_lens[:num_decodes]) if num_decodes else None,
            num_decodes=num_decodes,
            cu_seqlens=cu_seqlens,
        )
        return self.tensor(input_ids), self.tensor(positions), context

    def slots(self, seq: Sequence, start: int, stop: int) -> list[int]:
        """The slots of a sequence's tokens `start` … `stop - 1`; -1 for one that has been kept."""
        size, kept = self.block_size, seq.num_cached_tokens
        return [
            seq.block_table[i // size] * size + i % size if i >= kept else -1
            for i in range(start, stop)
        ]

    def block_tables(self, seqs: list[Sequence]) -> torch.Tensor:
        """The sequences' block tables, [num_seqs, max_blocks] int64, padded with 0."""
        width = max(len(seq.block_table) for seq in seqs)
        return self.tensor([seq.block_table + [0] * (width - len(seq.block_table)) for seq in seqs])

    def allocate_kv_cache(self, config: Config) -> None:
        """The pool: `num_blocks` blocks, and one more that takes what nobody keeps."""
        self.block_size = config.kvcache_block_size
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        heads = (self.model_config.num_key_value_heads, self.model_config.head_dim)
        dtype = self.model.lm_head.weight.dtype
        block_bytes = 2 * len(layers) * self.block_size * prod(heads) * dtype.itemsize
        self.num_blocks = config.num_kvcache_blocks
        if self.num_blocks < 0:
            self.num_blocks = self.cache_budget(config) // block_bytes - 1
        if self.num_blocks < 1:
            raise ValueError(
                f"no room for a block of {self.block_size} tokens, {block_bytes:,} bytes, in "
                f"num_kvcache_blocks={config.num_kvcache_blocks}"
            )
        # [key or value, layer, block, position, head, channel]
        shape = (2, len(layers), self.num_blocks + 1, self.block_size, *heads)
        # zeros, for what a mask hides is multiplied by 0, and 0 * NaN is NaN
        self.kv_cache = zeros(shape, dtype, self.device)
        for layer, k_cache, v_cache in zip(layers, *self.kv_cache, strict=True):
            layer.k_cache, layer.v_cache = k_cache, v_cache

    def cache_budget(self, config: Config) -> int:
        """How many bytes the cache may take."""
        if self.device.type == "cpu":
            return CPU_CACHE_BYTES
        torch.cuda.empty_cache()  # what an earlier engine gave back to torch, torch gives back
        free, total = torch.cuda.mem_get_info(self.device)
        return int(config.gpu_memory_utilization * total) - (total - free)

    def prepare_decode(self, seqs: list[Sequence]) -> Prepared:
        """The one token of each sequence that is not in the cache yet."""
        at = [seq.num_computed_tokens for seq in seqs]
        input_ids = [seq.token_ids[i] for seq, i in zip(seqs, at, strict=True)]
        slots = [self.slots(seq, i, i + 1)[0] for seq, i in zip(seqs, at, strict=True)]
        context_lens = [i + 1 for i in at]
        context = Context(
            slot_mapping=self.tensor(slots),
            block_tables=self.block_tables(seqs),
            context_lens=context_lens,
            mask=self.decode_mask(context_lens),
            num_decodes=len(seqs),
        )
        return self.tensor(input_ids), self.tensor(at), context

    def decode_mask(self, context_lens: list[int]) -> torch.Tensor | None:
        """True where a sequence has a token, [num_seqs, 1, 1, longest]; None if all are as long."""
        if min(context_lens) == max(context_lens):
            return None
        column = torch.arange(max(context_lens), device=self.device)
        return (column < self.tensor(context_lens).unsqueeze(1))[:, None, None]

"""From logits to token ids."""

from dataclasses import dataclass, fields

import torch
from torch import nn

from nanovllm.kernels.jit import uses_triton
from nanovllm.kernels.sample import sample

MASK32 = 0xFFFFFFFF


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit integers, held in int64, so that each input bit moves every output bit.

    Constants: lowbias32 of Wellons' hash prospector. The same integers come out on every device.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def exponential_noise(seeds: torch.Tensor, positions: torch.Tensor, size: int) -> torch.Tensor:
    """Exponential random numbers that depend on (seed, position, column) and nothing else.

    seeds, positions: [num_seqs] int64 -> [num_seqs, size] float32, each > 0. A counter-based
    generator (Salmon et al. 2011) has no state: neither the batch nor the order can change it.
    """
    key = mix32(mix32(mix32(seeds & MASK32) + (seeds >> 32 & MASK32)) + positions)
    column = torch.arange(size, device=seeds.device)
    bits = mix32((key.unsqueeze(1) + column * 0x9E3779B9) & MASK32)
    uniform = (bits.float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))  # float32 may have rounded it up to 1


def keep_top_k_top_p(
    logits: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor
) -> torch.Tensor:
    """-inf for all but the k likeliest tokens, and of these all but the nucleus of mass p.

    logits: [num_seqs, vocab_size]; top_ks: [num_seqs] int64, 0 for all; top_ps: [num_seqs].
    """
    logits, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    drop_k = (rank >= top_ks.unsqueeze(1)) & (top_ks > 0).unsqueeze(1)
    probs = logits.masked_fill(drop_k, -torch.inf).softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    drop = drop_k | (mass_before >= top_ps.unsqueeze(1))
    drop[:, 0] = False  # rounding must not drop the likeliest token
    return torch.empty_like(logits).scatter_(1, order, logits.masked_fill(drop, -torch.inf))


@dataclass(slots=True)
class SamplingTensors:
    """A batch's sampling parameters; each tensor is [num_seqs]."""

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor  # index that the sampled token will have in its sequence
    all_greedy: bool
    any_filtered: bool  # some sequence has top-k or top-p

    def rows(self, rows: slice) -> "SamplingTensors":
        """The parameters of a part of the batch."""
        values = [getattr(self, field.name) for field in fields(self)]
        return SamplingTensors(*(v[rows] if isinstance(v, torch.Tensor) else v for v in values))


ROWS = 64  # at a time, for a sort takes more than ten bytes of memory for each byte of logits


class Sampler(nn.Module):
    """Chooses one token a sequence: greedily, or by the Gumbel-max trick (Maddison et al. 2014)."""

    def forward(self, logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
        """logits: [num_seqs, vocab_size] -> token_ids: [num_seqs] int64"""
        if uses_triton(logits) and not sampling.any_filtered:
            return sample(logits, sampling.temperatures, sampling.seeds, sampling.positions)
        if len(logits) > ROWS:
            parts = [slice(start, start + ROWS) for start in range(0, len(logits), ROWS)]
            return torch.cat([self(logits[rows], sampling.rows(rows)) for rows in parts])
        greedy = logits.argmax(dim=-1)
        if sampling.all_greedy:
            return greedy
        is_greedy = sampling.temperatures == 0
        # The best score is 0 and the others are below: no temperature, however low, overflows.
        scores = logits.float() - logits.amax(dim=-1, keepdim=True)
        scores = scores / sampling.temperatures.clamp(min=2.0**-126).unsqueeze(1)
        if sampling.any_filtered:
            scores = keep_top_k_top_p(scores, sampling.top_ks, sampling.top_ps)
        noise = exponential_noise(sampling.seeds, sampling.positions, logits.shape[-1])
        return torch.where(is_greedy, greedy, (scores - noise.log()).argmax(dim=-1))

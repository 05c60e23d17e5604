"""From logits to token ids."""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels.candidates import sample_filtered_
from nanovllm.kernels.jit import uses_triton
from nanovllm.kernels.sample import Parts, sample, sample_best, sample_parts
from nanovllm.parallel.group import get_group

MASK32 = 0xFFFFFFFF


def mix32(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit integers, held in int64, so that each input bit moves every output bit.

    Constants: lowbias32 of Wellons' hash prospector. The same integers come out on every device.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def key_words(seeds: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two 32-bit words for each (seed, position), both [num_seqs] int64.

    Each line can be undone, as in a Feistel network: at one position no two of the 2**64 seeds
    share their words. Nor do two positions below 2**32, under seeds with the same high half.
    """
    low, high = seeds & MASK32, seeds >> 32 & MASK32
    a = mix32((low + mix32(positions & MASK32)) & MASK32)
    b = mix32((high + a + positions) & MASK32)
    return mix32((a + b) & MASK32), b


def exponential_noise(
    seeds: torch.Tensor, positions: torch.Tensor, size: int, first: int = 0
) -> torch.Tensor:
    """Exponential random numbers that depend on (seed, position, column) and nothing else.

    seeds, positions: [num_seqs] int64 -> [num_seqs, size] float32, each > 0, for the columns from
    `first` on. A counter-based generator (Salmon et al. 2011) has no state: neither the batch nor
    the order can change it.
    """
    a, b = (word.unsqueeze(1) for word in key_words(seeds, positions))
    column = (torch.arange(first, first + size, device=seeds.device) * 0x9E3779B9) & MASK32
    x = ((column ^ (column >> 16)) + a) & MASK32
    bits = mix32(((x ^ (x >> 16)) * 0x85EBCA6B + b) & MASK32)
    uniform = (bits.float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform.clamp(max=1 - 2.0**-24))  # float32 may have rounded it up to 1


def keep_likely(
    logits: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor
) -> torch.Tensor:
    """-inf for all but the k likeliest tokens, and of these all but the nucleus of mass p.

    logits: [num_seqs, vocab_size]; top_ks: [num_seqs] int64, 0 for all; top_ps, min_ps: [num_seqs].
    Before all, tokens go that have less than min_p of the likeliest one's probability. Of tokens
    that are equally likely the first ones in the vocabulary count as likelier.
    """
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    drop = (rank >= top_ks.unsqueeze(1)) & (top_ks > 0).unsqueeze(1)
    drop |= (logits - logits[:, :1]).exp() < min_ps.unsqueeze(1)
    probs = logits.masked_fill(drop, -torch.inf).softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    drop |= (mass_before >= top_ps.unsqueeze(1)) & (top_ps < 1).unsqueeze(1)
    drop[:, 0] = False  # the likeliest token stays, also where top_p is so small that it is 0
    return torch.empty_like(logits).scatter_(1, order, logits.masked_fill(drop, -torch.inf))


@dataclass(slots=True)
class SamplingTensors:
    """A batch's sampling parameters; each tensor but the last is [num_seqs].

    filters: top_ks, int64, top_ps and min_ps, float32.
    """

    temperatures: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor  # index that the sampled token will have in its sequence
    all_greedy: bool
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    filtered: torch.Tensor | None = None  # int64: the rows that ask for one of these, if any

    def asking(self) -> torch.Tensor:
        """The rows that a filter can change, int64."""
        assert self.filters is not None
        top_ks, top_ps, min_ps = self.filters
        cuts = (top_ks > 0) | (top_ps < 1) | (min_ps > 0)
        return (cuts & (self.temperatures > 0)).nonzero().flatten()

    def rows(self, rows: torch.Tensor, filtered: torch.Tensor | None) -> "SamplingTensors":
        """The parameters of some rows, of which those at `filtered` ask for a filter."""
        draw = self.temperatures[rows], self.seeds[rows], self.positions[rows]
        filters = None
        if self.filters is not None:
            top_ks, top_ps, min_ps = self.filters
            filters = top_ks[rows], top_ps[rows], min_ps[rows]
        return SamplingTensors(*draw, self.all_greedy, filters, filtered)


def sample_torch(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """One token a row: greedily, or by the Gumbel-max trick (Maddison et al. 2014).

    logits: [num_seqs, vocab_size] -> token_ids: [num_seqs] int64, -1 for a row that holds a NaN.
    """
    best, greedy = logits.max(dim=-1)  # a NaN counts as the largest
    greedy = greedy.masked_fill(best.isnan(), -1)
    if sampling.all_greedy:
        return greedy
    is_greedy = (sampling.temperatures == 0) | (greedy < 0)
    # The best score is 0 and the others are below: no temperature, however low, overflows.
    scores = logits.float() - best.unsqueeze(1)
    scores = scores / sampling.temperatures.clamp(min=2.0**-126).unsqueeze(1)
    if (rows := sampling.filtered) is not None:
        assert sampling.filters is not None
        scores[rows] = keep_likely(scores[rows], *(x[rows] for x in sampling.filters))
    noise = exponential_noise(sampling.seeds, sampling.positions, logits.shape[-1])
    return torch.where(is_greedy, greedy, (scores - noise.log()).argmax(dim=-1))


class Sampler(nn.Module):
    """Chooses one token a sequence, from the logits of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.group = get_group()
        self.is_alone = self.group.size == 1

    def forward(
        self, logits: torch.Tensor, sampling: SamplingTensors, first: int = 0
    ) -> torch.Tensor:
        """Everybody is sampled without a filter, and the rows that ask for one once more.

        logits: [num_seqs, num_columns], the columns from `first` of the vocabulary on ->
        token_ids: [num_seqs] int64, -1 where there is a NaN.
        """
        token_ids = self.choose(logits, sampling, first)
        if sampling.filtered is not None:
            self.resample(token_ids, logits, sampling)
        return token_ids

    def resample(
        self, token_ids: torch.Tensor, logits: torch.Tensor, sampling: SamplingTensors
    ) -> None:
        """Overwrite the tokens of the rows that ask for a filter, which needs all ranks' logits."""
        assert sampling.filters is not None
        logits = self.group.gather(logits)
        if uses_triton(logits):
            draw = sampling.temperatures, sampling.seeds, sampling.positions
            sample_filtered_(token_ids, logits, draw, sampling.filters)
        elif len(rows := sampling.asking()) > 0:
            token_ids[rows] = sample_in_turn(logits, sampling, rows, keep=True)

    def choose(
        self, logits: torch.Tensor, sampling: SamplingTensors, first: int = 0
    ) -> torch.Tensor:
        """One token for each row, and nobody's is filtered."""
        draw = sampling.temperatures, sampling.seeds, sampling.positions
        if self.group.size > 1:
            if uses_triton(logits):
                parts = sample_parts(logits, *draw, first)
            else:
                parts = sample_parts_torch(logits, sampling, first)
            # As floats, of which each whole number below 2**24 is one.
            numbers = self.group.gather(torch.cat([part.float() for part in parts], dim=1))
            both = numbers.view(len(logits), self.group.size, 3, -1)
            highest, scores, tokens = (both[:, :, i].flatten(1).contiguous() for i in range(3))
            best = sample_best if uses_triton(logits) else sample_best_torch
            return best((highest, scores, tokens.int()), draw[0])
        if uses_triton(logits):
            return sample(logits, *draw)
        rows = torch.arange(len(logits), device=logits.device)
        return sample_in_turn(logits, sampling, rows, keep=False)


ROWS = 64  # at a time, for a sort takes more than ten bytes of memory for each byte of logits


def sample_in_turn(
    logits: torch.Tensor, sampling: SamplingTensors, rows: torch.Tensor, keep: bool
) -> torch.Tensor:
    """`sample_torch` for some rows, [len(rows)], ROWS at a time; with `keep`, filtered."""
    token_ids = []
    for some in rows.split(ROWS):
        part = sampling.rows(some, torch.arange(len(some), device=some.device) if keep else None)
        token_ids.append(sample_torch(logits[some], part))
    return torch.cat(token_ids)


def sample_parts_torch(logits: torch.Tensor, sampling: SamplingTensors, first: int) -> Parts:
    """`sample_parts` in torch: the columns from `first` of the vocabulary on are one part."""
    x, heat = logits.float(), sampling.temperatures.unsqueeze(1)
    highest = x.amax(dim=1, keepdim=True)
    scores = x - highest.where(highest > -torch.inf, 0)
    if not sampling.all_greedy:
        noise = exponential_noise(sampling.seeds, sampling.positions, x.shape[1], first)
        scores = scores.where(heat == 0, scores / heat.clamp(min=2.0**-126) - noise.log())
    best, at = scores.max(dim=1, keepdim=True)
    tokens = (first + at).masked_fill(x.isnan().any(dim=1, keepdim=True), -1)
    return highest, best, tokens.int()


def sample_best_torch(parts: Parts, temperatures: torch.Tensor) -> torch.Tensor:
    """`sample_best` in torch: the best token of all parts, -1 for a row that holds a NaN."""
    (highest, scores, tokens), heat = parts, temperatures.unsqueeze(1)
    behind = highest - highest.amax(dim=1, keepdim=True)
    scores = behind.where(heat == 0, scores + behind / heat.clamp(min=2.0**-126))
    token_ids = tokens.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1).long()
    return token_ids.masked_fill((tokens < 0).any(dim=1), -1)

"""Sampling from few candidates: for rows that ask for top-k, top-p or min-p."""

import torch

from nanovllm.kernels.fixed_order import order_is_fixed
from nanovllm.kernels.jit import num_processors, overlaps, tl, triton, wait_for_inputs
from nanovllm.kernels.likely_tokens import asks_for_less, key_at, keys_of, take
from nanovllm.kernels.sample import LN_2, TINY, exponential_noise
from nanovllm.kernels.whole_row import whole_row_kernel


@triton.jit
def maxima_kernel(
    maxima, masses, logits, temperatures, top_ks, top_ps, min_ps, num_columns, num_parts,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row and GROUP parts of WIDTH columns: each one's highest logit, and mass."""
    seq, part = tl.program_id(0), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    at = part[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    wait_for_inputs(PDL)
    if asks_for_less(seq, temperatures, top_ks, top_ps, min_ps):
        row = logits + seq.to(tl.int64) * num_columns
        x = tl.load(row + at, mask=at < num_columns, other=-float("inf")).to(tl.float32)
        best = tl.max(x, axis=1)
        cold = 1 / tl.maximum(tl.load(temperatures + seq), TINY)
        behind = x - tl.where(best > -float("inf"), best, 0.0)[:, None]
        there = part < num_parts
        tl.store(maxima + seq * num_parts + part, best, mask=there)
        tl.store(masses + seq * num_parts + part, tl.sum(tl.exp(behind * cold), axis=1), mask=there)


@triton.jit
def find_parts(
    near, highest, mass, best, cold, min_p, wanted, num_parts,
    SHIFT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """List the parts that have candidates: how many, their mass, and the least candidate's key."""
    part = tl.arange(0, PARTS)
    there = part < num_parts
    key = tl.where(there, keys_of(highest, SHIFT), 0)
    lowest = key_at(key, there.to(tl.float32), wanted, 32 - SHIFT)
    is_near = there & (key >= lowest) & (tl.exp((highest - best) * cold) >= min_p)
    rank = tl.cumsum(is_near.to(tl.int32), axis=0) - 1
    tl.store(near + rank, part, mask=is_near)
    tl.debug_barrier()  # the list is read by all threads
    return tl.sum(is_near.to(tl.int32), axis=0), tl.sum(tl.where(is_near, mass, 0), axis=0), lowest


@triton.jit
def best_and_mass(maxima, masses, cold, num_parts, PARTS: tl.constexpr):
    """The parts' highest logits, the highest of all, and the parts' masses, counted from there."""
    part = tl.arange(0, PARTS)
    there = part < num_parts
    highest = tl.load(maxima + part, mask=there, other=-float("inf"))
    best = tl.max(highest, axis=0)
    best = tl.where(best > -float("inf"), best, 0.0)
    mass = tl.load(masses + part, mask=there, other=0.0)
    return highest, best, mass * tl.exp((highest - best) * cold)


@triton.jit
def collect(
    values, columns, near, row, num_near, num_columns, best, cold, min_p, lowest,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write the candidates of the listed parts side by side, in their order; returns how many."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, num_near, CHUNK):
        at = tl.arange(0, CHUNK * WIDTH)
        which = start + at // WIDTH
        part = tl.load(near + which, mask=which < num_near, other=0)
        column = part * WIDTH + at % WIDTH
        there = (which < num_near) & (column < num_columns)
        x = tl.load(row + column, mask=there, other=-float("inf")).to(tl.float32)
        is_likely = (keys_of(x, SHIFT) >= lowest) & (tl.exp((x - best) * cold) >= min_p) & there
        place = count + tl.cumsum(is_likely.to(tl.int32), axis=0) - 1
        tl.store(values + place, x, mask=is_likely & (place < ROOM))
        tl.store(columns + place, column, mask=is_likely & (place < ROOM))
        count += tl.sum(is_likely.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def choose(
    values, columns, count, total, best, cold, top_k, top_p, min_p, seed, position,
    SHIFT: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The winner of what the filters keep of the candidates, and whether these were enough.

    They are where top-k or min-p says which there can be, or where they hold the nucleus.
    """
    place = tl.arange(0, ROOM)
    there = place < count
    x = tl.load(values + place, mask=there, other=-float("inf"))
    column = tl.load(columns + place, mask=there, other=0)
    key = tl.where(there, keys_of(x, SHIFT), 0)
    mass = tl.where(there, tl.exp((x - best) * cold), 0.0)
    kept = there
    if top_k > 0:
        kept &= take(key, there.to(tl.float32), top_k.to(tl.float32), 32 - SHIFT)
    held = tl.sum(tl.where(kept, mass, 0.0), axis=0)
    is_all = (top_k > 0) | (min_p > 0)
    bound = tl.maximum(top_p * tl.where(is_all, held, total), 1e-30)
    if top_p < 1:
        kept &= take(tl.where(kept, key, 0), tl.where(kept, mass, 0.0), bound, 32 - SHIFT)
    noise = exponential_noise(seed, position, column)
    score = tl.where(kept, (x - best) * cold - LN_2 * tl.log2(noise), -float("inf"))
    won = kept & (score == tl.max(score, axis=0))
    token = tl.min(tl.where(won, column, 2**31 - 1), axis=0)
    return token, (count <= ROOM) & (is_all | (bound <= held))


@triton.jit(do_not_specialize=["looked_at"])
def candidates_kernel(
    token_ids, left, values, columns, near, maxima, masses, logits, temperatures, seeds, positions,
    top_ks, top_ps, min_ps, num_columns, num_parts, looked_at,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    ROOM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    seq = tl.program_id(0)
    wait_for_inputs(PDL)
    is_left = tl.full([], 0, tl.int32)
    if asks_for_less(seq, temperatures, top_ks, top_ps, min_ps):
        top_k, top_p, min_p = tl.load(top_ks + seq), tl.load(top_ps + seq), tl.load(min_ps + seq)
        cold = 1 / tl.maximum(tl.load(temperatures + seq), TINY)
        parts, room = seq * num_parts, seq * ROOM
        highest, best, mass = best_and_mass(maxima + parts, masses + parts, cold, num_parts, PARTS)
        total = tl.sum(mass, axis=0)
        wanted = tl.where(top_k > 0, top_k, tl.where(min_p > 0, num_columns, looked_at))
        num_near, held, lowest = find_parts(
            near + parts, highest, mass, best, cold, min_p, wanted.to(tl.float32), num_parts,
            SHIFT, PARTS,
        )  # fmt: skip
        is_hopeless = (top_k == 0) & (min_p == 0) & (held < top_p * total)
        count = collect(
            values + room, columns + room, near + parts, logits + seq.to(tl.int64) * num_columns,
            tl.where(is_hopeless, 0, num_near), num_columns, best, cold, min_p, lowest, SHIFT,
            WIDTH, CHUNK, ROOM,
        )  # fmt: skip
        token, is_enough = choose(
            values + room, columns + room, count, total, best, cold, top_k, top_p, min_p,
            tl.load(seeds + seq), tl.load(positions + seq), SHIFT, ROOM,
        )  # fmt: skip
        is_left = ((is_enough == 0) & (total == total)).to(tl.int32)
        tl.store(token_ids + seq, tl.where(total == total, token, -1).to(tl.int64))  # no NaN?
    tl.store(left + seq, is_left)


WIDTH, GROUP = 256, 8  # columns of a part, parts of a program
ROOM, CHUNK = 2048, 32  # candidates of a row, parts that are read at a time
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def has_many_rows(logits: torch.Tensor) -> bool:
    """Are there rows for all multiprocessors, and more?"""
    return len(logits) > num_processors(logits.device) or order_is_fixed()


def sample_filtered_(
    token_ids: torch.Tensor, logits: torch.Tensor, draw: Three, filters: Three
) -> None:
    """Overwrite the tokens of the rows that ask for a filter, as `sample_torch` chooses them.

    token_ids: [num_seqs] int64; logits: [num_seqs, vocab_size], contiguous; draw: temperatures,
    float32, seeds, positions, int64; filters: top_ks, int64, 0 for all, top_ps, min_ps, float32;
    each [num_seqs]. Equal logits are taken in the order of the vocabulary.
    """
    left = sample_candidates_(token_ids, logits, draw, filters)
    # Half a multiprocessor's registers for a row, or all of them where the rows are few.
    many, pdl = has_many_rows(logits), overlaps(logits)
    whole_row_kernel[len(logits),](
        token_ids, left, logits, *draw, *filters, logits.shape[1], SHIFT=spare_bits(logits),
        BLOCK=4096 if many else 8192, PDL=pdl, launch_pdl=pdl, num_warps=8 if many else 16,
    )  # fmt: skip


def spare_bits(logits: torch.Tensor) -> int:
    """Bits of a float32 that are 0 in every logit, which need not be looked at."""
    return 16 if logits.dtype == torch.bfloat16 else 0


def sample_candidates_(
    token_ids: torch.Tensor, logits: torch.Tensor, draw: Three, filters: Three
) -> torch.Tensor:
    """The same for the rows whose candidates are enough; 1 for each row that is left, else 0."""
    (num_seqs, num_columns), pdl = logits.shape, overlaps(logits)
    num_parts = triton.cdiv(num_columns, WIDTH)
    maxima = logits.new_empty((num_seqs, num_parts), dtype=torch.float32)
    masses, near = torch.empty_like(maxima), torch.empty_like(maxima, dtype=torch.int32)
    values = logits.new_empty((num_seqs, ROOM), dtype=torch.float32)
    columns, left = torch.empty_like(values, dtype=torch.int32), torch.empty_like(token_ids)
    maxima_kernel[num_seqs, triton.cdiv(num_parts, GROUP)](
        maxima, masses, logits, draw[0], *filters, num_columns, num_parts,
        WIDTH=WIDTH, GROUP=GROUP, PDL=pdl, launch_pdl=pdl, num_warps=4,
    )  # fmt: skip
    looked_at = num_columns if num_columns <= ROOM else min(7 * num_parts // 8, 512)
    candidates_kernel[num_seqs,](
        token_ids, left, values, columns, near, maxima, masses, logits, *draw, *filters,
        num_columns, num_parts, looked_at, SHIFT=spare_bits(logits), WIDTH=WIDTH,
        PARTS=triton.next_power_of_2(num_parts), CHUNK=CHUNK, ROOM=ROOM, PDL=pdl, launch_pdl=pdl,
        num_warps=8,
    )  # fmt: skip
    return left

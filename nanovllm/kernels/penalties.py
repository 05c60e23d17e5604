"""Penalties: smaller logits for tokens that a sequence already holds."""

from dataclasses import dataclass

import torch

from nanovllm.kernels.jit import overlaps, tl, triton, uses_triton, wait_for_inputs

IN_PROMPT = tl.constexpr(1 << 30)  # a count never comes near it


@triton.jit
def tokens_of(history, table, at, length, BLOCK_SIZE: tl.constexpr):
    """A sequence's tokens at some positions, -1 where there is none; found through its blocks."""
    block = tl.load(table + at // BLOCK_SIZE, mask=at < length, other=-1).to(tl.int64)
    return tl.load(history + block * BLOCK_SIZE + at % BLOCK_SIZE, mask=block >= 0, other=-1)


@triton.jit
def count_tokens(
    counts, history, table, length, prompt_len, num_columns,
    FIRST: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a sequence's tokens, as far as they are among the columns from FIRST on."""
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = tokens_of(history, table, at, length, BLOCK_SIZE) - FIRST
        there = (column >= 0) & (column < num_columns)
        in_prompt = at < prompt_len
        said = tl.zeros([BLOCK], tl.int32)
        tl.atomic_or(counts + column, said + IN_PROMPT, mask=there & in_prompt, sem="relaxed")
        tl.atomic_add(counts + column, said + 1, mask=there & (at >= prompt_len), sem="relaxed")
    tl.debug_barrier()  # all threads' counts are there


@triton.jit
def lower_logits(
    row, counts, history, table, length, num_columns, repetition, presence, frequency,
    FIRST: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Change the logit of each token that has been counted, once, and leave zeros."""
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = tokens_of(history, table, at, length, BLOCK_SIZE) - FIRST
        there = (column >= 0) & (column < num_columns)
        zeros = tl.zeros([BLOCK], tl.int32)
        count = tl.atomic_xchg(counts + column, zeros, mask=there, sem="relaxed")
        is_mine = there & (count > 0)
        x = tl.load(row + column, mask=is_mine, other=0.0).to(tl.float32)
        x = tl.where(x > 0, x / repetition, x * repetition)
        times = (count & (IN_PROMPT - 1)).to(tl.float32)
        x -= frequency * times + tl.where(times > 0, presence, 0.0)
        tl.store(row + column, x.to(row.dtype.element_ty), mask=is_mine)
    tl.debug_barrier()  # the next row finds zeros


@triton.jit(do_not_specialize=["num_seqs"])
def penalties_kernel(
    logits, counts, history, block_tables, table_rows, lengths, prompt_lens, repetitions, presences,
    frequencies, num_seqs, num_columns, max_blocks,
    FIRST: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many-th row."""
    wait_for_inputs(PDL)
    counts += tl.program_id(0) * num_columns
    for seq in range(tl.program_id(0), num_seqs, tl.num_programs(0)):
        repetition, presence = tl.load(repetitions + seq), tl.load(presences + seq)
        frequency = tl.load(frequencies + seq)
        if (repetition != 1) | (presence != 0) | (frequency != 0):
            row = logits + tl.cast(seq, tl.int64) * num_columns
            table = block_tables + tl.load(table_rows + seq) * max_blocks
            length, prompt_len = tl.load(lengths + seq), tl.load(prompt_lens + seq)
            count_tokens(
                counts, history, table, length, prompt_len, num_columns, FIRST, BLOCK_SIZE, BLOCK
            )
            lower_logits(
                row, counts, history, table, length, num_columns, repetition, presence, frequency,
                FIRST, BLOCK_SIZE, BLOCK,
            )  # fmt: skip


PROGRAMS = 64


@dataclass(slots=True)
class Penalties:
    """What a step's sequences have said, and what repeating it costs; most are [num_seqs]."""

    history: torch.Tensor  # the token in each slot, [num_blocks, block_size] int32
    counts: torch.Tensor  # zeros, [PROGRAMS, num_columns] int32
    block_tables: torch.Tensor  # [num_rows, max_blocks] int32, -1 where there is no block
    table_rows: torch.Tensor  # int64
    lengths: torch.Tensor  # int64
    prompt_lens: torch.Tensor  # int64
    repetitions: torch.Tensor  # float32, as the next two
    presences: torch.Tensor
    frequencies: torch.Tensor


def penalise_(logits: torch.Tensor, penalties: Penalties, first: int = 0) -> None:
    """Change the logits, [num_seqs, num_columns], of tokens that their sequences hold.

    Column 0 is the token `first`. What `history` holds behind a sequence's `lengths` is not read.
    """
    if not uses_triton(logits):
        return penalise_torch_(logits, penalties, first)
    p, pdl = penalties, overlaps(logits)
    (num_seqs, num_columns), max_blocks = logits.shape, p.block_tables.shape[1]
    penalties_kernel[PROGRAMS,](
        logits, p.counts, p.history, p.block_tables, p.table_rows, p.lengths, p.prompt_lens,
        p.repetitions, p.presences, p.frequencies, num_seqs, num_columns, max_blocks, FIRST=first,
        BLOCK_SIZE=p.history.shape[1], BLOCK=1024, PDL=pdl, launch_pdl=pdl, num_warps=8,
    )  # fmt: skip


def penalise_torch_(logits: torch.Tensor, penalties: Penalties, first: int = 0) -> None:
    """`penalise_` in torch, row by row."""
    p, size = penalties, penalties.history.shape[1]
    asking = (p.repetitions != 1) | (p.presences != 0) | (p.frequencies != 0)
    for seq in asking.nonzero().flatten().tolist():
        at = torch.arange(int(p.lengths[seq]), device=logits.device)
        block = p.block_tables[p.table_rows[seq]][at // size].long()
        column = p.history[block, at % size].long() - first
        there = (block >= 0) & (column >= 0) & (column < logits.shape[1])
        said, is_new = column[there], (at >= p.prompt_lens[seq])[there]
        times = torch.bincount(said[is_new], minlength=logits.shape[1])
        x = logits[seq].float()
        repeated = torch.where(x > 0, x / p.repetitions[seq], x * p.repetitions[seq])
        x[said] = repeated[said]
        x -= p.frequencies[seq] * times + p.presences[seq] * (times > 0)
        logits[seq] = x.to(logits.dtype)

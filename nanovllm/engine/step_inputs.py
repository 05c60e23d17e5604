"""A step's inputs, all in one buffer: one copy brings them to the device."""

import pickle
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.engine.asked import CHOICES, LINE, Asked, line_of
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import SamplingTensors


class Shape(NamedTuple):
    """The size of a step."""

    num_tokens: int
    num_seqs: int
    num_decodes: int  # the sequences in front, which bring one token each

    @classmethod
    def of(cls, seqs: list[Sequence]) -> "Shape":
        """The size of the step that these sequences make."""
        counts = [seq.num_scheduled_tokens for seq in seqs]
        return cls(sum(counts), len(seqs), counts.count(1))

    @property
    def prompts(self) -> tuple[int, int]:
        """How many tokens its prompts have, and how many prompts there are."""
        return self.num_tokens - self.num_decodes, self.num_seqs - self.num_decodes

    def fits(self, other: "Shape") -> bool:
        """Can a step of this shape be padded to the other?"""
        own = self.prompts if other.num_decodes else self[:2]
        fewer = all(a <= b for a, b in zip(own, other.prompts, strict=True))
        return fewer and (self.num_decodes <= other.num_decodes or not other.num_decodes)


DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}
ALIGNMENT = 16  # bytes; a kernel is compiled anew for a pointer that is aligned otherwise
Inputs = dict[str, torch.Tensor]


class InputLayout:
    """Where in the buffer each input of a step of some shape lies."""

    def __init__(self, shape: Shape, max_blocks: int):
        tokens, seqs = (shape.num_tokens,), (shape.num_seqs,)
        self.fields = {  # name: (type, shape, what the padding is)
            "input_ids": (np.int64, tokens, 0),
            "positions": (np.int64, tokens, 0),
            "slot_mapping": (np.int64, tokens, -1),  # -1: nothing is stored
            "lengths": (np.int64, seqs, 0),  # all its tokens: the position of the one to be sampled
            "last": (np.int64, seqs, 0),  # which of the step's tokens is the sequence's last
            "table_rows": (np.int64, seqs, 0),  # which of the rows of block_tables is its own
            "context_lens": (np.int32, seqs, 0),
            "cu_seqlens": (np.int32, (shape.num_seqs + 1,), 0),
            "order": (np.int32, seqs, 0),  # the decodes, the longest first
            "block_tables": (np.int32, (shape.num_seqs, max_blocks), -1),  # -1: no block
            **{name: (kind, seqs, padding) for name, (kind, _, padding) in CHOICES.items()},
        }
        self.spans, self.num_bytes = {}, 0
        for name, (kind, size, _) in self.fields.items():
            stop = self.num_bytes + prod(size) * np.dtype(kind).itemsize
            self.spans[name] = slice(self.num_bytes, stop)
            self.num_bytes = -(-stop // ALIGNMENT) * ALIGNMENT

    def arrays(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs in a buffer of bytes on the host."""
        return {
            name: buffer[self.spans[name]].view(kind).reshape(size)
            for name, (kind, size, _) in self.fields.items()
        }

    def tensors(self, buffer: torch.Tensor) -> Inputs:
        """The inputs in a buffer of bytes on the device."""
        return {
            name: buffer[self.spans[name]].view(DTYPES[kind]).view(size)
            for name, (kind, size, _) in self.fields.items()
        }


@dataclass(slots=True)
class Step:
    """A step as it is launched: what it takes is in it, and no sequence any more."""

    shape: Shape  # with its padding
    num_seqs: int  # without
    max_new: int  # the most tokens that a sequence brings
    asked: Asked
    layout: InputLayout
    host: torch.Tensor  # the inputs as they lie in `layout`, [num_bytes] uint8

    def to_bytes(self) -> bytes:
        """The step as a message to another rank."""
        head = pickle.dumps((self.shape, self.num_seqs, self.max_new, self.asked))
        return len(head).to_bytes(4, "little") + head + self.host.numpy().tobytes()


def scheduled_tokens(seqs: list[Sequence]) -> list[int]:
    """The tokens that the sequences bring, one after another; 0 for one that is gone."""
    input_ids: list[int] = []
    for seq in seqs:
        start, count = seq.num_computed_tokens, seq.num_scheduled_tokens
        tokens = seq.token_ids[start : start + count]
        input_ids += tokens
        if len(tokens) < count:
            input_ids += [0] * (count - len(tokens))  # those behind keep their places
    return input_ids


def fill_tables(tables: np.ndarray, seqs: list[Sequence]) -> np.ndarray:
    """Each sequence's blocks into a row of `tables`, which is returned; -1 stays behind them."""
    for table, seq in zip(tables, seqs, strict=True):
        table[: len(seq.block_table)] = seq.block_table
    return tables


def slot_mapping(
    seqs: list[Sequence],
    tables: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
    block_size: int,
) -> np.ndarray:
    """Each token's slot, [num_tokens] int64; -1 for one that is cached, or has no block.

    tables: [num_seqs, max_blocks], -1 where there is no block; row, position: [num_tokens], whose
    each token is, and where in the text.
    """
    kept = np.array([seq.num_cached_tokens for seq in seqs], dtype=np.int64)
    block = tables[row, position // block_size].astype(np.int64)
    slot = block * block_size + position % block_size
    return np.where((block < 0) | (position < kept[row]), -1, slot)


def prepare_decode(put: dict[str, np.ndarray], seqs: list[Sequence], block_size: int) -> None:
    """The first rows: sequences that bring one token each."""
    n, row = len(seqs), np.arange(len(seqs))
    position = np.array([seq.num_computed_tokens for seq in seqs], dtype=np.int64)
    put["input_ids"][:n] = scheduled_tokens(seqs)
    put["positions"][:n] = position
    tables = fill_tables(put["block_tables"][:n], seqs)
    put["slot_mapping"][:n] = slot_mapping(seqs, tables, row, position, block_size)
    put["context_lens"][:n] = position + 1


def prepare_prefill(
    put: dict[str, np.ndarray], seqs: list[Sequence], first: int, block_size: int
) -> None:
    """The rows from `first` on, behind as many decodes: sequences that bring several tokens."""
    starts = put["cu_seqlens"]
    starts[:first], starts[first:] = np.arange(first), first
    if not seqs:
        return
    start = np.array([seq.num_computed_tokens for seq in seqs], dtype=np.int64)
    count = np.array([seq.num_scheduled_tokens for seq in seqs], dtype=np.int64)
    stop = count.cumsum()
    row = np.repeat(np.arange(len(seqs)), count)  # whose each token is
    position = np.arange(len(row)) + (start - stop + count)[row]
    tokens, rows = slice(first, first + len(row)), slice(first, first + len(seqs))
    put["input_ids"][tokens] = scheduled_tokens(seqs)
    put["positions"][tokens] = position
    tables = fill_tables(put["block_tables"][rows], seqs)
    put["slot_mapping"][tokens] = slot_mapping(seqs, tables, row, position, block_size)
    put["context_lens"][rows] = start + count
    starts[first + 1 :] = first + len(row)
    starts[first + 1 : first + 1 + len(seqs)] = first + stop


def prepare_sample(put: dict[str, np.ndarray], seqs: list[Sequence]) -> None:
    """How each sequence's token is to be chosen."""
    n, lines = len(seqs), np.frombuffer(b"".join([line_of(seq) for seq in seqs]), LINE)
    put["lengths"][:n] = [len(seq.token_ids) for seq in seqs]
    for name in CHOICES:
        put[name][:n] = lines[name]


def sampling_of(inputs: Inputs, all_greedy: bool = False) -> SamplingTensors:
    """How the tokens of a step with these inputs are to be chosen."""
    draw = inputs["temperatures"], inputs["seeds"], inputs["lengths"]
    filters = inputs["top_ks"], inputs["top_ps"], inputs["min_ps"]
    return SamplingTensors(*draw, all_greedy, filters)


class Draft:
    """Where steps of one shape are laid out, one after another, each to be copied."""

    def __init__(self, layout: InputLayout):
        self.layout = layout
        self.buffer = np.zeros(layout.num_bytes, np.uint8)
        self.put = layout.arrays(self.buffer)

    def clear(self) -> dict[str, np.ndarray]:
        """The step's inputs, all padding."""
        for name, (_, _, padding) in self.layout.fields.items():
            self.put[name].fill(padding)
        return self.put


class Packer:
    """Lays out steps, each in a buffer of its own on the host."""

    def __init__(self, block_size: int, max_blocks: int, pin_memory: bool):
        self.block_size, self.max_blocks = block_size, max_blocks
        self.pin_memory = pin_memory
        self.shapes: list[Shape] = []  # those that are recorded, small ones first
        self.draft_of = lru_cache(8)(lambda shape: Draft(InputLayout(shape, max_blocks)))

    def shape_for(self, seqs: list[Sequence]) -> Shape:
        """The smallest recorded shape that holds the step of these sequences, else its own."""
        own = Shape.of(seqs)
        larger = self.shapes[bisect_left(self.shapes, own[:1]) :]  # with as many tokens or more
        return next((shape for shape in larger if own.fits(shape)), own)

    def pack(self, seqs: list[Sequence], shape: Shape | None = None) -> Step:
        """The step of these sequences, padded to `shape`; without any, all of it is padding."""
        shape = self.shape_for(seqs) if shape is None else shape
        draft = self.draft_of(shape)
        put = draft.clear()
        n, first = len(seqs), shape.num_decodes
        counts = [seq.num_scheduled_tokens for seq in seqs]
        num_decodes = counts.count(1) if first else 0  # without any they count as prompts
        prepare_decode(put, seqs[:num_decodes], self.block_size)
        prepare_prefill(put, seqs[num_decodes:], first, self.block_size)
        prepare_sample(put, seqs)
        put["last"][:num_decodes] = np.arange(num_decodes)
        ends = put["cu_seqlens"][first + 1 : first + 1 + n - num_decodes]
        put["last"][num_decodes:n] = ends - 1
        put["table_rows"][:n] = np.r_[:num_decodes, first : first + n - num_decodes]
        put["order"][:first] = np.argsort(-put["context_lens"][:first])
        longest = max(counts, default=shape.prompts[0])
        host = torch.empty(len(draft.buffer), dtype=torch.uint8, pin_memory=self.pin_memory)
        host.numpy()[:] = draft.buffer
        return Step(shape, n, longest, Asked.of(seqs), draft.layout, host)

    def unpack(self, message: bytes) -> Step:
        """The step of a message; ready to be launched."""
        size = 4 + int.from_bytes(message[:4], "little")
        shape, n, max_new, asked = pickle.loads(message[4:size])
        host = torch.frombuffer(bytearray(message[size:]), dtype=torch.uint8)
        host = host.pin_memory() if self.pin_memory else host
        layout = InputLayout(shape, self.max_blocks)
        return Step(shape, n, max_new, asked, layout, host)

"""What the cache holds, and where."""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Prefix:
    """A text that fills its blocks to the edge, and where its last block lies.

    Prefixes form a tree: each continues its parent by one block of tokens.
    """

    parent: "Prefix | None"
    token_ids: list[int]  # of the last block
    hash: int
    block_ids: list[int] = field(default_factory=list)  # copies of the last block; none: forgotten


@dataclass(slots=True, eq=False)
class Block:
    """A place for `block_size` tokens, and what is known about its contents."""

    block_id: int
    ref_count: int = 0  # the tables that it is in
    prefix: Prefix | None = None  # whose last block it holds

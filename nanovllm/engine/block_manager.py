"""Who owns which block of the cache. Plain Python: no tensor is touched here."""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

import xxhash

from nanovllm.engine.block import Block, Prefix
from nanovllm.engine.sequence import Sequence


class BlockManager:
    """Hands out the blocks of the cache, shares them and takes them back."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.free_blocks = OrderedDict((block.block_id, block) for block in self.blocks)
        self.prefixes: dict[int, list[Prefix]] = {}  # by hash; two in one list have collided
        self.epoch = 0  # grows with every reset_prefix_cache
        self.num_queried_tokens = self.num_hit_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.block_size)

    @staticmethod
    def compute_hash(token_ids: list[int], parent_hash: int = 0) -> int:
        """The hash of a prefix: that of its last block, seeded with that of all before it."""
        return xxhash.xxh64_intdigest(array("q", token_ids).tobytes(), seed=parent_hash)

    def find(self, parent: Prefix | None, token_ids: list[int]) -> tuple[int, Prefix | None]:
        """The hash of the prefix that continues `parent`, and the prefix if it is known.

        The hash only says where to look. What counts are the tokens, and that everything before
        them is the same: two texts whose hashes collide are told apart.
        """
        key = self.compute_hash(token_ids, parent.hash if parent else 0)
        for prefix in self.prefixes.get(key, ()):
            if prefix.parent is parent and prefix.token_ids == token_ids:
                return key, prefix
        return key, None

    def match(self, seq: Sequence) -> list[Prefix]:
        """The prefixes of a waiting sequence whose blocks are in the cache, the longest last.

        It goes on from where the last call for this sequence ended, so that a prompt that waits
        is not hashed again with every step. One whose prompt is to be scored has none.
        """
        found, size = seq.prefixes, self.block_size
        if seq.params.prompt_logprobs is not None:
            found.clear()
            return found
        while found and not found[-1].block_ids:
            found.pop()
        while self.enable_prefix_caching and (len(found) + 1) * size <= len(seq):
            start = len(found) * size
            parent = found[-1] if found else None
            _, prefix = self.find(parent, seq.token_ids[start : start + size])
            if prefix is None:
                break
            found.append(prefix)
        return found

    def can_allocate(self, seq: Sequence, reserve: int = 0) -> bool:
        """Are there blocks for all tokens of a waiting sequence, with `reserve` to spare?"""
        found = self.match(seq)
        needed = self.blocks_for(len(seq)) - len(found)
        free = len(self.free_blocks) - reserve
        if needed > free:
            return False
        # A hit that nobody uses lies among the free blocks, and is one less to take.
        return needed + sum(not self.in_use(prefix) for prefix in found) <= free

    def in_use(self, prefix: Prefix) -> bool:
        """Does a copy of it have an owner?"""
        return any(self.blocks[block_id].ref_count > 0 for block_id in prefix.block_ids)

    def can_append(self, seq: Sequence) -> bool:
        """Is there a slot for a growing sequence's newest token, or a block to be had?"""
        return len(self.free_blocks) > 0 or self.blocks_for(len(seq)) <= len(seq.block_table)

    def allocate(self, seq: Sequence) -> None:
        """Give a new sequence blocks for all its tokens, as many as possible from the cache."""
        seq.epoch = self.epoch
        for prefix in self.match(seq):
            block = max((self.blocks[i] for i in prefix.block_ids), key=lambda b: b.ref_count)
            if block.ref_count == 0:
                del self.free_blocks[block.block_id]
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.num_cached_tokens = len(seq.block_table) * self.block_size
        seq.num_computed_tokens = min(seq.num_cached_tokens, len(seq) - 1)  # one must be run
        self.num_queried_tokens += len(seq)
        self.num_hit_tokens += seq.num_cached_tokens
        while len(seq.block_table) < self.blocks_for(len(seq)):
            seq.block_table.append(self.take_block())

    def may_append(self, seq: Sequence) -> None:
        """Give a growing sequence one more block if its newest token has no slot."""
        if self.blocks_for(len(seq)) > len(seq.block_table):
            seq.block_table.append(self.take_block())

    def take_block(self) -> int:
        """The free block that has been free for longest; what it held is forgotten."""
        block_id, block = self.free_blocks.popitem(last=False)
        self.forget(block)
        block.ref_count = 1
        return block_id

    def forget(self, block: Block) -> None:
        """A block's contents are about to be overwritten: nobody may find them any more."""
        prefix, block.prefix = block.prefix, None
        if prefix is None:
            return
        prefix.block_ids.remove(block.block_id)
        if not prefix.block_ids:  # that was the last copy
            collided = self.prefixes[prefix.hash]
            collided.remove(prefix)
            if not collided:
                del self.prefixes[prefix.hash]

    def cache_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Make the blocks that the sequence's first `num_tokens` tokens fill known to all.

        Call it when these tokens are computed, or will be in the step that is being scheduled.
        """
        if seq.epoch != self.epoch or not self.enable_prefix_caching:
            return  # the cache has been reset since: what the sequence holds must not be found
        size, known = self.block_size, seq.prefixes
        while (len(known) + 1) * size <= num_tokens:
            start = len(known) * size
            parent = known[-1] if known else None
            token_ids = seq.token_ids[start : start + size]
            key, prefix = self.find(parent, token_ids)
            if prefix is None:
                prefix = Prefix(parent, token_ids, key)
                self.prefixes.setdefault(key, []).append(prefix)
            block = self.blocks[seq.block_table[len(known)]]
            block.prefix = prefix
            prefix.block_ids.append(block.block_id)
            known.append(prefix)

    def deallocate(self, seq: Sequence) -> None:
        """Let go of a sequence's blocks. What they hold can be found until they are reused."""
        for block_id in reversed(seq.block_table):  # so that the end of a text is lost first
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_blocks[block_id] = block
                if block.prefix is None:  # worth nothing: the first to be reused
                    self.free_blocks.move_to_end(block_id, last=False)
        seq.block_table.clear()

    def reset_prefix_cache(self) -> None:
        """Forget all contents; running sequences keep their blocks, but to themselves."""
        self.epoch += 1
        for block in self.blocks:
            self.forget(block)

    def check_integrity(self, seqs: Iterable[Sequence]) -> None:
        """Raise RuntimeError unless the books agree with these sequences' tables.

        Each block is free or in exactly `ref_count` tables; what is known of a block is true both
        ways; no prefix outlives the one that it continues.
        """
        owners = Counter(block_id for seq in seqs for block_id in seq.block_table)
        if not owners.keys() <= set(range(self.num_blocks)):
            raise RuntimeError(f"a table names no block of {self.num_blocks}: {sorted(owners)}")
        for block in self.blocks:
            if block.ref_count != owners[block.block_id]:
                raise RuntimeError(f"{block} is in {owners[block.block_id]} tables")
            if (block.ref_count == 0) != (block.block_id in self.free_blocks):
                raise RuntimeError(f"{block} is free and owned, or neither")
            if block.prefix and block.block_id not in block.prefix.block_ids:
                raise RuntimeError(f"{block} is unknown to its prefix")
        paths = set()
        for key, prefixes in self.prefixes.items():
            for prefix in prefixes:
                path = (id(prefix.parent), *prefix.token_ids)
                copies = [self.blocks[block_id].prefix for block_id in prefix.block_ids]
                if not copies or any(copy is not prefix for copy in copies):
                    raise RuntimeError(f"{prefix} does not lie where it says")
                if path in paths or key != prefix.hash:
                    raise RuntimeError(f"{prefix} is there twice, or under a wrong hash")
                if prefix.parent and not prefix.parent.block_ids:
                    raise RuntimeError(f"{prefix} continues what is forgotten")
                paths.add(path)

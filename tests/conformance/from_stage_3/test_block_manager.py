"""The block manager alone: each block has one owner or none, and its books show any damage."""

from itertools import permutations
from random import Random

import pytest
from memory import append, free_ids, make_seq, num_free

from nanovllm.engine.block_manager import BlockManager

SIZES = (1, 2, 7, 16, 256)


def distinct_seq(number: int, length: int):
    """A sequence that begins like no other, so that no stage shares its blocks."""
    return make_seq(range(number * 10**6, number * 10**6 + length), seq_id=number)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_for_rounds_up(size):
    manager = BlockManager(4, size)
    assert manager.blocks_for(0) == 0
    for full in (1, 2, 5, 1000):
        assert manager.blocks_for(full * size) == full
        assert manager.blocks_for(full * size + 1) == full + 1
        assert manager.blocks_for((full - 1) * size + 1) == full


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("edge", [1, 2, 3])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_sequence_owns_as_many_blocks_as_its_tokens_fill(size, edge, offset):
    """At its start, and as it grows by two blocks, token by token."""
    length = max(edge * size + offset, 1)
    manager = BlockManager(8, size)
    seq, other = distinct_seq(1, length), distinct_seq(2, 1)
    for new in (other, seq):
        manager.allocate(new)
    for token_id in range(2 * size + 1):
        assert len(seq.block_table) == -(-len(seq) // size)
        assert num_free(manager) == 8 - len(seq.block_table) - 1
        assert len({*seq.block_table, *other.block_table}) == len(seq.block_table) + 1
        manager.check_integrity([seq, other])
        before = list(seq.block_table)
        append(seq, token_id)
        manager.may_append(seq)
        manager.may_append(seq)  # once is enough
        assert seq.block_table[: len(before)] == before, "a block that is in use has moved"
    manager.deallocate(seq)
    assert seq.block_table == []
    manager.deallocate(other)
    assert sorted(free_ids(manager)) == list(range(8))


def test_the_whole_pool_can_be_given_out():
    manager = BlockManager(6, 4)
    seqs = [distinct_seq(number, 8) for number in range(3)]
    for seq in seqs:
        manager.allocate(seq)
    assert num_free(manager) == 0
    assert sorted(block_id for seq in seqs for block_id in seq.block_table) == list(range(6))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_blocks_come_back_in_any_order(order):
    manager = BlockManager(9, 2)
    seqs = [distinct_seq(number, 5) for number in range(3)]
    for seq in seqs:
        manager.allocate(seq)
    for done, number in enumerate(order, start=1):
        manager.deallocate(seqs[number])
        manager.check_integrity(seqs)
        assert num_free(manager) == 3 * done
    manager.allocate(distinct_seq(4, 18))
    assert num_free(manager) == 0


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_books_are_right_after_every_random_operation(size):
    random = Random(size)
    manager, seqs = BlockManager(12, size), []
    for number in range(2000):
        fitting = random.randint(1, 3 * size)
        if seqs and random.random() < 0.3:
            manager.deallocate(seqs.pop(random.randrange(len(seqs))))
        elif seqs and random.random() < 0.7:
            seq = random.choice(seqs)
            if num_free(manager) or len(seq) % size:
                append(seq, number)
                manager.may_append(seq)
        elif manager.blocks_for(fitting) <= num_free(manager):
            seqs.append(distinct_seq(number, fitting))
            manager.allocate(seqs[-1])
        manager.check_integrity(seqs)
        owned = sum(-(-len(seq) // size) for seq in seqs)
        assert num_free(manager) == 12 - owned


def take_free(manager: BlockManager) -> int:
    """Drop a free block from the list of free ones."""
    if hasattr(manager, "free_blocks"):
        return manager.free_blocks.popitem()[0]
    return manager.free_block_ids.pop()


def give_free(manager: BlockManager, block_id: int) -> None:
    """List a block as free."""
    if hasattr(manager, "free_blocks"):
        manager.free_blocks[block_id] = manager.blocks[block_id]
    else:
        manager.free_block_ids.append(block_id)


DAMAGE = {
    "a free block is lost": lambda manager, a, b: take_free(manager),
    "an owned block is lost": lambda manager, a, b: a.block_table.pop(),
    "a whole table is lost": lambda manager, a, b: a.block_table.clear(),
    "a block is in two tables": lambda manager, a, b: b.block_table.append(a.block_table[0]),
    "a block is twice in one table": lambda manager, a, b: a.block_table.append(a.block_table[0]),
    "two entries of a table are one": lambda manager, a, b: a.block_table.__setitem__(
        1, a.block_table[0]
    ),
    "a block is free and owned": lambda manager, a, b: give_free(manager, a.block_table[0]),
    "a free block is in a table": lambda manager, a, b: a.block_table.append(free_ids(manager)[0]),
    "a table names no block": lambda manager, a, b: a.block_table.append(manager.num_blocks),
    "a table counts from the end": lambda manager, a, b: a.block_table.append(-1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind):
    manager = BlockManager(8, 4)
    a, b = distinct_seq(1, 9), distinct_seq(2, 3)
    manager.allocate(a)
    manager.allocate(b)
    manager.check_integrity([a, b])
    DAMAGE[kind](manager, a, b)
    with pytest.raises(RuntimeError):
        manager.check_integrity([a, b])


def test_a_sequence_that_nobody_mentions_is_damage():
    manager = BlockManager(8, 4)
    a, b = distinct_seq(1, 9), distinct_seq(2, 3)
    manager.allocate(a)
    manager.allocate(b)
    for seqs in ([], [a], [b]):
        with pytest.raises(RuntimeError):
            manager.check_integrity(seqs)

"""The block manager with prefix caching: what is found, what is shared, what is lost first."""

from __future__ import annotations

from collections import OrderedDict
from random import Random

import pytest
from memory import HASHES, admit, free_ids, grow, hits, make_seq, num_free

from nanovllm.engine.block_manager import BlockManager

TEXT = range(100, 120)


def other(number: int, length: int) -> range:
    """A text that begins like no other."""
    return range(number * 1000, number * 1000 + length)


@pytest.fixture
def manager():
    """Eight blocks of four tokens."""
    return BlockManager(8, 4)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 12])
def test_a_second_text_shares_the_full_blocks_of_the_first(manager, length):
    first, second = make_seq(TEXT[:length]), make_seq(TEXT[:length])
    admit(manager, first, second)
    full = length // 4
    assert second.block_table[:full] == first.block_table[:full]
    assert not set(second.block_table[full:]) & set(first.block_table)
    assert second.num_cached_tokens == 4 * full
    assert second.num_computed_tokens == min(4 * full, length - 1), "one token must be run"
    assert (manager.num_queried_tokens, manager.num_hit_tokens) == (2 * length, 4 * full)
    manager.check_integrity([first, second])
    for seq in (first, second):
        manager.deallocate(seq)
    assert num_free(manager) == 8


def test_a_new_manager_has_counted_nothing(manager):
    assert (manager.num_hit_tokens, manager.num_queried_tokens) == (0, 0)


@pytest.mark.parametrize("length", [1, 4, 6, 8, 11, 20])
def test_a_longer_text_shares_as_far_as_both_go(manager, length):
    admit(manager, make_seq(TEXT[:11]))
    assert hits(manager, TEXT[:length]) == min(length, 11) // 4 * 4


@pytest.mark.parametrize("place", range(16))
def test_nothing_is_shared_from_the_first_different_block_on(manager, place):
    admit(manager, make_seq(TEXT[:16]))
    text = list(TEXT[:16])
    text[place] = 0
    assert hits(manager, text) == place // 4 * 4
    assert hits(manager, TEXT[:16]) == 16
    assert hits(manager, TEXT[1:17]) == hits(manager, TEXT[4:16]) == 0, "found without its parent"


def test_generated_tokens_are_found_as_well(manager):
    seq = make_seq(TEXT[:3])
    admit(manager, seq)
    for length in range(4, 14):
        grow(manager, seq, TEXT[length - 1])
        assert hits(manager, TEXT) == length // 4 * 4
        manager.check_integrity([seq])


def test_free_blocks_are_found_until_they_are_reused(manager):
    first = make_seq(TEXT[:12])
    admit(manager, first)
    table = list(first.block_table)
    manager.deallocate(first)
    assert num_free(manager) == 8
    second = make_seq(TEXT[:12])
    admit(manager, second)
    assert second.block_table == table and num_free(manager) == 5
    manager.check_integrity([second])


def test_the_block_that_was_let_go_first_is_reused_first(manager):
    """The end of a text before its beginning; before all others, what nobody can find."""
    a, b, unknown = make_seq(TEXT[:8]), make_seq(other(1, 8)), make_seq(other(2, 3))
    admit(manager, a, b, unknown)
    (a0, a1), (b0, b1), (u0,) = a.block_table, b.block_table, unknown.block_table
    untouched = free_ids(manager)
    for seq in (a, b, unknown):
        manager.deallocate(seq)
    taker = make_seq(other(3, 1))
    admit(manager, taker)
    found = []
    for number in range(28):
        found.append((hits(manager, TEXT[:8]), hits(manager, other(1, 8))))
        grow(manager, taker, number)
        manager.check_integrity([taker])
    assert taker.block_table == [u0, *untouched, a1, a0, b1, b0]
    assert sorted(set(found), reverse=True) == [(8, 8), (4, 8), (0, 8), (0, 4)]


def test_a_hit_makes_a_block_young_again(manager):
    for text in (TEXT[:8], other(1, 8), TEXT[:8]):
        seq = make_seq(text)
        admit(manager, seq)
        manager.deallocate(seq)
    admit(manager, make_seq(other(2, 24)))
    assert (hits(manager, TEXT[:8]), hits(manager, other(1, 8))) == (8, 0)


def two_copies(manager: BlockManager):
    """Two sequences that have filled a block with the same text, each on its own."""
    a, b = make_seq(TEXT[:6]), make_seq(TEXT[:6])
    admit(manager, a, b)
    for seq in (a, b):
        grow(manager, seq, *TEXT[6:9])
    assert a.block_table[0] == b.block_table[0] and a.block_table[1] != b.block_table[1]
    manager.check_integrity([a, b])
    return a, b


@pytest.mark.parametrize("first", [0, 1])
def test_a_text_is_found_as_long_as_one_of_its_copies_is_there(manager, first):
    pair = two_copies(manager)
    gone, left = pair[first], pair[1 - first]
    lost = gone.block_table[1]
    manager.deallocate(gone)
    taker = make_seq(other(1, 4 * num_free(manager)))
    admit(manager, taker)
    assert lost in taker.block_table and num_free(manager) == 0
    assert hits(manager, TEXT) == 8
    reader = make_seq(TEXT[:8])
    admit(manager, reader)
    assert reader.block_table == left.block_table[:2]
    manager.check_integrity([left, taker, reader])
    for seq in (left, reader, taker):
        manager.deallocate(seq)
    manager.check_integrity([])
    assert num_free(manager) == 8


@pytest.mark.parametrize("first", [0, 1])
def test_a_hit_takes_the_copy_that_is_in_use(manager, first):
    """And leaves the other one free."""
    pair = two_copies(manager)
    manager.deallocate(pair[first])
    free, reader = num_free(manager), make_seq(TEXT[:8])
    admit(manager, reader)
    assert num_free(manager) == free
    assert reader.block_table == pair[1 - first].block_table[:2]


def test_two_copies_may_be_lost_one_after_the_other(manager):
    for seq in two_copies(manager):
        manager.deallocate(seq)
    assert hits(manager, TEXT) == 8
    taker = make_seq(other(1, 1))
    admit(manager, taker)
    for number in range(31):
        manager.check_integrity([taker])
        grow(manager, taker, number)
    assert num_free(manager) == 0 and hits(manager, TEXT) == 0


@pytest.mark.parametrize("kind", HASHES)
def test_texts_whose_hashes_collide_are_told_apart(manager, monkeypatch, kind):
    monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(HASHES[kind]))
    texts = [TEXT[:8], other(1, 8), [*TEXT[:4], 1, 2, 3, 4], [*other(1, 4), *TEXT[4:8]]]
    seqs = [make_seq(text) for text in texts]
    admit(manager, *seqs)
    tables = [seq.block_table for seq in seqs]
    assert tables[2][0] == tables[0][0] and tables[3][0] == tables[1][0], "equal blocks are shared"
    assert len({block_id for table in tables for block_id in table}) == 6
    assert [hits(manager, text) for text in texts] == [8] * 4
    assert hits(manager, TEXT[4:12]) == 0, "found without its parent"
    manager.check_integrity(seqs)
    for i in (1, 0, 3, 2):
        manager.deallocate(seqs[i])
    admit(manager, make_seq(other(2, 12)))
    assert hits(manager, texts[0]) + hits(manager, texts[1]) < 16, "nothing was lost"


@pytest.mark.parametrize("kind", [None, *HASHES])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_hit_is_always_the_same_text(monkeypatch, size, kind):
    """Random texts of two tokens, against the blocks' contents as a plain list has them."""
    if kind:
        monkeypatch.setattr(BlockManager, "compute_hash", staticmethod(HASHES[kind]))
    random, manager, seqs, contents = Random(size), BlockManager(10, size), [], {}

    def write(seq, start):
        for i in range(start, len(seq)):
            contents[seq.block_table[i // size], i % size] = seq.token_ids[: i + 1]

    num_hits = 0
    for _ in range(3000):
        if seqs and random.random() < 0.4:
            manager.deallocate(seqs.pop(random.randrange(len(seqs))))
        elif seqs and random.random() < 0.5:
            seq = random.choice(seqs)
            if num_free(manager) or len(seq) % size:
                grow(manager, seq, random.randrange(2))
                write(seq, len(seq) - 1)
        elif num_free(manager) >= 4:
            seq = make_seq(random.choices(range(2), k=random.randint(1, 4 * size)))
            admit(manager, seq)
            num_hits += seq.num_cached_tokens
            write(seq, seq.num_cached_tokens)
            seqs.append(seq)
        manager.check_integrity(seqs)
        for seq in seqs:
            for i in range(len(seq)):
                found = contents[seq.block_table[i // size], i % size]
                assert found == seq.token_ids[: i + 1]
    assert num_hits == manager.num_hit_tokens > 1000


def test_the_hash_is_that_of_all_tokens_in_their_order():
    compute = BlockManager.compute_hash
    texts = [(1, 2), (2, 1), (1, 2, 0), (1, 2**31), (1, 2 + 2**32), (513,), (1, 1)]
    keys = [compute(list(text), parent) for text in texts for parent in (0, 1, compute([1, 2]))]
    assert len(set(keys)) == len(keys)
    assert compute([1, 2], 3) == compute([1, 2], 3)


def test_a_block_that_repeats_has_another_hash_at_every_place(manager):
    admit(manager, make_seq([5] * 32))
    assert [len(prefixes) for prefixes in manager.prefixes.values()] == [1] * 8


def test_without_prefix_caching_nothing_is_found():
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    a, b = make_seq(TEXT[:9]), make_seq(TEXT[:9])
    admit(manager, a, b)
    grow(manager, a, *range(4))
    assert not set(a.block_table) & set(b.block_table)
    assert (a.num_cached_tokens, a.num_computed_tokens, manager.num_hit_tokens) == (0, 0, 0)
    assert hits(manager, TEXT) == 0 and not manager.prefixes
    manager.check_integrity([a, b])


def test_a_reset_forgets_everything_and_takes_no_block_from_a_sequence(manager):
    running, done = make_seq(TEXT[:9]), make_seq(other(1, 9))
    admit(manager, running, done)
    manager.deallocate(done)
    table = list(running.block_table)
    manager.reset_prefix_cache()
    manager.check_integrity([running])
    assert running.block_table == table and num_free(manager) == 5
    assert hits(manager, TEXT) == hits(manager, other(1, 9)) == 0 and not manager.prefixes
    grow(manager, running, *range(8))
    manager.check_integrity([running])
    manager.deallocate(running)
    assert num_free(manager) == 8


@pytest.mark.parametrize("length", range(1, 9))
def test_what_was_computed_before_a_reset_is_not_found_after_it(manager, length):
    """Also where it is the beginning of a block that is filled up only now."""
    seq = make_seq(TEXT[:length])
    admit(manager, seq)
    manager.reset_prefix_cache()
    grow(manager, seq, *TEXT[length:16])
    assert hits(manager, TEXT) == 0
    manager.deallocate(seq)
    again = make_seq(TEXT[:16])
    admit(manager, again)
    assert again.num_cached_tokens == 0 and hits(manager, TEXT) == 16
    manager.check_integrity([again])


def test_a_waiting_text_is_hashed_once(manager, hashed):
    admit(manager, make_seq(TEXT[:16]))
    waiting = make_seq([*TEXT[:16], 1, 2, 3, 4, 5])
    hashed.clear()
    assert len(manager.match(waiting)) == 4 and len(hashed) == 5
    for _ in range(20):
        hashed.clear()
        assert len(manager.match(waiting)) == 4
        assert len(hashed) <= 1, "only what was not found is looked for again"


def test_the_match_of_a_waiting_text_follows_the_cache(manager):
    """It gains what others compute meanwhile, and loses what is overwritten."""
    waiting, writer = make_seq(TEXT[:12]), make_seq(TEXT[:4])
    assert manager.match(waiting) == []
    admit(manager, writer)
    assert len(manager.match(waiting)) == 1
    grow(manager, writer, *TEXT[4:12])
    assert len(manager.match(waiting)) == 3
    manager.deallocate(writer)
    taker = make_seq(other(1, 28))
    admit(manager, taker)
    assert len(manager.match(waiting)) == 1
    manager.reset_prefix_cache()
    assert manager.match(waiting) == []
    manager.deallocate(taker)
    admit(manager, waiting)
    assert waiting.num_cached_tokens == 0
    manager.check_integrity([waiting])


class Unscanned(OrderedDict):
    """A dict that nobody may walk through."""

    def __iter__(self):
        raise AssertionError("walked through")

    keys = values = items = __iter__


class UnscannedList(list):
    """A list that nobody may walk through."""

    def __iter__(self):
        raise AssertionError("walked through")

    __contains__ = index = count = remove = None


def test_no_operation_looks_at_more_blocks_than_it_moves():
    manager = BlockManager(1000, 4)
    manager.free_blocks = Unscanned(manager.free_blocks)
    manager.blocks = UnscannedList(manager.blocks)
    manager.prefixes = Unscanned()
    for number in range(600):  # more than fit: blocks are reused
        first, second = make_seq(other(number, 9)), make_seq(other(number, 9))
        admit(manager, first, second)
        grow(manager, second, *range(8))
        manager.deallocate(first)
        manager.deallocate(second)
    assert len(manager.free_blocks) == 1000 and manager.num_hit_tokens == 600 * 8


def forget_child_first(manager: BlockManager, seq) -> None:
    """Lose the block that another continues."""
    manager.forget(manager.blocks[seq.block_table[0]])


def file_elsewhere(manager: BlockManager, seq) -> None:
    """Move an entry to a hash that is not its own."""
    prefix = seq.prefixes[1]
    manager.prefixes[prefix.hash + 1] = manager.prefixes.pop(prefix.hash)


DAMAGE = {
    "an owner too many": lambda m, seq: setattr(m.blocks[seq.block_table[0]], "ref_count", 2),
    "no owner": lambda m, seq: setattr(m.blocks[seq.block_table[0]], "ref_count", 0),
    "a block does not know its text": lambda m, seq: setattr(
        m.blocks[seq.block_table[0]], "prefix", None
    ),
    "a block has another text": lambda m, seq: setattr(
        m.blocks[seq.block_table[0]], "prefix", seq.prefixes[1]
    ),
    "a text does not know its block": lambda m, seq: seq.prefixes[1].block_ids.clear(),
    "a text lies in a free block": lambda m, seq: seq.prefixes[1].block_ids.append(free_ids(m)[0]),
    "a text is there twice": lambda m, seq: m.prefixes[seq.prefixes[1].hash].append(
        seq.prefixes[1]
    ),
    "a text is under a wrong hash": file_elsewhere,
    "a text continues what is forgotten": forget_child_first,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(manager, kind):
    seq = make_seq(TEXT[:9])
    admit(manager, seq)
    manager.check_integrity([seq])
    DAMAGE[kind](manager, seq)
    with pytest.raises(RuntimeError):
        manager.check_integrity([seq])

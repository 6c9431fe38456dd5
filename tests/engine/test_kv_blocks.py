"""KV blocks: what may be shared, what is overwritten first, and books that always balance."""

import random

import pytest

from serve.engine.kv_blocks import KvBlocks, hash_block, hash_seed


def _hashes(num_blocks: int, digest: str | None = None, salt: str = "") -> list[bytes]:
    chain = [hash_seed(digest, salt)]
    for index in range(num_blocks):
        chain.append(hash_block(chain[-1], [index] * 4))
    return chain[1:]


def _publish(blocks: KvBlocks, num_blocks: int) -> list[int]:
    table = blocks.acquire([], num_blocks)
    assert table is not None
    for block_id, block_hash in zip(table, _hashes(num_blocks), strict=True):
        blocks.publish(block_id, block_hash)
    return table


def test_nothing_is_taken_when_too_few_blocks_are_available() -> None:
    blocks = KvBlocks(4, 4)
    held = blocks.acquire([], 3)
    assert held is not None
    assert blocks.acquire([], 2) is None
    assert not blocks.extend(held, 5)
    assert len(held) == 3 and blocks.num_available == 1
    blocks.check_invariants([held])


def test_a_cached_prefix_block_is_not_counted_twice_as_available() -> None:
    blocks = KvBlocks(3, 4)
    blocks.release(_publish(blocks, 2))
    shared = blocks.match(_hashes(2))
    # both cached blocks are the prefix itself: of the three available ones only one is new
    assert blocks.num_new_needed(shared, 4) == 4
    assert blocks.acquire(shared, 4) is None
    table = blocks.acquire(shared, 3)
    assert table is not None and table[:2] == shared
    blocks.check_invariants([table])


def test_releasing_a_block_twice_is_refused() -> None:
    blocks = KvBlocks(2, 4)
    table = blocks.acquire([], 1)
    assert table is not None
    again = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="released more often"):
        blocks.release(again)


def test_publishing_a_block_that_nobody_holds_is_refused() -> None:
    with pytest.raises(AssertionError, match="held by nobody"):
        KvBlocks(2, 4).publish(0, b"hash")


def test_the_tail_of_a_cached_chain_is_overwritten_before_its_head() -> None:
    blocks = KvBlocks(3, 4)
    blocks.release(_publish(blocks, 3))
    other = blocks.acquire([], 1)
    assert other is not None
    assert len(blocks.match(_hashes(3))) == 2
    blocks.check_invariants([other])


def test_a_chain_matches_only_under_the_same_digest_and_salt() -> None:
    blocks = KvBlocks(3, 4)
    table = _publish(blocks, 3)
    assert blocks.match(_hashes(3)) == table
    assert blocks.match(_hashes(3, digest="a")) == []
    assert blocks.match(_hashes(3, salt="a")) == []
    assert hash_seed("ab", "c") != hash_seed("a", "bc")


def test_a_match_ends_at_the_first_unknown_block() -> None:
    blocks = KvBlocks(4, 4)
    table = _publish(blocks, 3)
    hashes = _hashes(3)
    assert blocks.match([hashes[0], b"unknown", hashes[2]]) == table[:1]


def test_of_two_equal_blocks_the_first_stays_published() -> None:
    blocks = KvBlocks(2, 4)
    first = _publish(blocks, 1)
    second = _publish(blocks, 1)
    assert blocks.match(_hashes(1)) == first
    blocks.release(second)
    assert not blocks.is_published(1 - first[0])
    blocks.check_invariants([first])


def test_retracting_leaves_blocks_that_another_sequence_holds() -> None:
    blocks = KvBlocks(4, 4)
    first = _publish(blocks, 2)
    second = blocks.acquire(blocks.match(_hashes(1)), 3)
    assert second is not None
    assert blocks.retract(second) == second[1:]
    assert blocks.match(_hashes(2)) == first
    blocks.release(second)
    assert blocks.retract(first) == first
    assert blocks.match(_hashes(2)) == []
    blocks.check_invariants([first])


def test_books_balance_under_random_use() -> None:
    rng = random.Random(7)
    blocks = KvBlocks(12, 4)
    tables: list[list[int]] = []
    for _ in range(5000):
        if tables and rng.random() < 0.45:
            table = tables.pop(rng.randrange(len(tables)))
            if rng.random() < 0.1:
                blocks.retract(table)
            blocks.release(table)
        elif tables and rng.random() < 0.3:
            table = rng.choice(tables)
            blocks.extend(table, len(table) + rng.randint(0, 2))
        else:
            hashes = _hashes(4, digest=rng.choice((None, "a", "b")))
            shared = blocks.match(hashes[: rng.randint(0, 4)])
            acquired = blocks.acquire(shared, len(shared) + rng.randint(0, 3))
            if acquired is not None:
                tables.append(acquired)
                for block_id, block_hash in zip(acquired, hashes, strict=False):
                    if rng.random() < 0.7:
                        blocks.publish(block_id, block_hash)
        blocks.check_invariants(tables)
    assert blocks.num_in_use == len({block_id for table in tables for block_id in table})

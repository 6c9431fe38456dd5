"""Eviction policies: every resident is named once, and each policy drops first what its paper says."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.eviction import MAX_GHOSTS, POLICIES, EvictionPolicy, Gdsf, Lfu, Lru, S3Fifo, WTinyLfu
from serve.engine.recent_uses import RecentUses

ALL = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())


def _entered(policy: EvictionPolicy, digests: Iterable[str]) -> EvictionPolicy:
    for digest in digests:
        policy.enter(digest)
    return policy


@ALL
@given(digests=st.lists(st.sampled_from("abcdefghij"), max_size=60), data=st.data())
def test_every_resident_is_named_once(
    make: Callable[[], EvictionPolicy], digests: list[str], data: st.DataObject
) -> None:
    policy, residents = make(), set[str]()
    for digest in digests:
        if digest not in residents:
            policy.enter(digest)
            residents.add(digest)
        elif data.draw(st.booleans()):
            policy.weigh(digest, data.draw(st.integers(0, 1 << 30)))
            policy.use(digest)
        else:
            policy.leave(digest)
            residents.remove(digest)
        named = list(policy.victims())
        assert len(named) == len(residents)
        assert set(named) == residents


@ALL
def test_an_empty_policy_names_nobody(make: Callable[[], EvictionPolicy]) -> None:
    policy = _entered(make(), "a")
    policy.leave("a")
    assert list(policy.victims()) == []


def test_lru_drops_what_was_not_used_for_longest() -> None:
    policy = _entered(Lru(), "abc")
    policy.use("a")
    assert list(policy.victims()) == ["b", "c", "a"]


def test_lfu_keeps_the_frequent_against_a_scan() -> None:
    policy = _entered(Lfu(), "abc")
    for _ in range(3):
        policy.use("a")
    _entered(policy, ("x", "y", "z"))
    assert list(policy.victims())[-1] == "a"


def test_gdsf_drops_the_large_first_and_ages_what_is_not_used() -> None:
    policy = _entered(Gdsf(), ("large", "small"))
    for digest, num_bytes in (("large", 1 << 30), ("small", 1 << 20)):
        policy.weigh(digest, num_bytes)
        policy.use(digest)
    assert next(policy.victims()) == "large"
    for number in range(30):
        policy.enter(f"new{number}")
        policy.weigh(f"new{number}", 1 << 20)
        policy.use(f"new{number}")
        policy.leave(f"new{number}")
    policy.enter("newest")
    policy.weigh("newest", 1 << 20)
    policy.use("newest")
    assert list(policy.victims()) == ["large", "small", "newest"]


def test_w_tinylfu_measures_the_newcomer_against_the_oldest_of_the_main_part() -> None:
    policy = WTinyLfu()
    for digest in ("often", "once", "new"):
        policy.enter(digest)
    for _ in range(3):
        policy.use("often")
    assert list(policy.victims())[-1] == "often"
    for _ in range(5):
        policy.use("new")
    assert next(policy.victims()) == "once"


def test_s3_fifo_drops_newcomers_that_nobody_used_again_and_remembers_them() -> None:
    policy = _entered(S3Fifo(), ["used", "unused"])
    policy.use("used")
    policy.use("used")
    assert next(policy.victims()) == "unused"
    policy.leave("unused")
    # who comes back was dropped too early: it goes where scans do not reach
    _entered(policy, ["unused", "scan0", "scan1"])
    assert list(policy.victims())[:2] == ["scan0", "scan1"]


def test_s3_fifo_forgets_ghosts() -> None:
    policy = S3Fifo()
    for number in range(MAX_GHOSTS + 1):
        policy.enter(f"d{number}")
        policy.leave(f"d{number}")
    # the first ghost was forgotten, so it comes back as a newcomer; the last one goes where scans do not reach
    _entered(policy, [f"d{MAX_GHOSTS}", "d0"])
    assert list(policy.victims()) == ["d0", f"d{MAX_GHOSTS}"]


@given(digests=st.lists(st.text("abc", max_size=3), max_size=200))
def test_recent_uses_are_counted_exactly(digests: list[str]) -> None:
    uses = RecentUses()
    for digest in digests:
        uses.count(digest)
    assert all(uses[digest] == digests.count(digest) for digest in digests)
    assert uses["never seen"] == 0


def test_uses_are_forgotten_as_time_goes() -> None:
    uses = RecentUses()
    for _ in range(100):
        uses.count("hot")
    for number in range(500):
        uses.count(f"d{number}")
    assert uses["hot"] == 100
    for number in range(100):
        uses.count(f"e{number}")
    assert uses["hot"] == 50
    for number in range(100_000):
        uses.count(f"f{number}")
    assert uses["hot"] == 0 and len(uses) < 640


def test_uses_are_remembered_longer_where_there_are_more_residents() -> None:
    uses = RecentUses()
    for _ in range(100):
        uses.count("hot", 1000)
    for number in range(2000):
        uses.count(f"d{number}", 1000)
    assert uses["hot"] == 100

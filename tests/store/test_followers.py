"""Replicas over one folder and a real Redis, which is killed, frozen, emptied and forbidden meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.exceptions import NoPermissionError

from adapters_store.errors import InvalidOption, RegistryUnavailable
from adapters_store.redis_head import COMMANDS, RedisHead, acl_line, is_refused
from adapters_store.redis_url import masked
from adapters_store.registry_follower import MAX_PAUSE_S, Follower
from adapters_store.registry_redis import SharedRegistry
from tests.redis_server import RedisServer
from tests.store.registry_cases import new, set_alias


@dataclass(frozen=True)
class Replica:
    """One process's view: its registry and its ear."""

    registry: SharedRegistry
    head: RedisHead
    follower: Follower

    def knows(self, name: str) -> int:
        """Return the current version of a name, 0 if it is unknown."""
        found = self.registry.current(name)
        return 0 if found is None else found.version


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Return a Redis of the test's own."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def replica(redis_server: RedisServer, tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Hand out a function that opens one more replica of the same store."""
    with ExitStack() as opened:
        # patient: a Redis that a busy machine holds up for a second is not away
        def open_one(url: str = "", wait_s: float = 0.01, timeout_s: float = 120.0) -> Replica:
            registry = SharedRegistry.open(tmp_path)
            head = RedisHead(url or redis_server.url, registry.store_id, wait_s=wait_s, timeout_s=timeout_s)
            registry.connect(head)
            opened.callback(registry.close)
            follower = Follower(registry, head, jitter=lambda: 1.0)
            opened.callback(follower.stop)
            return Replica(registry, head, follower)

        yield open_one


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Return once it holds; fail after the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def test_without_redis_names_stay_known_and_cannot_change(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a = replica()
    a.registry.publish(new())
    redis_server.kill()
    for change in (
        lambda: a.registry.publish(new()),
        lambda: set_alias(a.registry, "fr", "prod", 1),
        lambda: a.registry.delete("fr", now=1),
    ):
        with pytest.raises(RegistryUnavailable) as refused:
            change()
        assert (refused.value.http_status, refused.value.code) == (503, "registry_unavailable")
        assert refused.value.retry_after_s > 0 and "sock" not in refused.value.message
    assert a.knows("fr") == 1 and a.registry.digests(retired_since=0) == {"a" * 64}
    # an upload is refused before its bytes come, once a round has met the silence
    a.registry.check_free("de")
    a.follower.round()
    with pytest.raises(RegistryUnavailable):
        a.registry.check_free("de")


def test_a_frozen_redis_is_noticed_within_its_time_limits(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    patient, a = replica(), replica(timeout_s=0.5)
    patient.registry.publish(new())
    a.follower.look()
    redis_server.freeze()
    try:
        with pytest.raises(RegistryUnavailable):
            a.registry.publish(new())
        assert a.follower.round() > 0 and a.registry.is_away and a.knows("fr") == 1
    finally:
        redis_server.thaw()
    until(lambda: a.follower.round() == 0, "Redis is back")
    a.registry.check_free("de")
    assert patient.registry.publish(new()).version == 2


def test_pauses_grow_to_a_bound_and_end_with_the_first_answer(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a = replica()
    redis_server.kill()
    pauses = [a.follower.round() for _ in range(6)]
    assert pauses == sorted(pauses) and pauses[0] < pauses[1] and pauses[-1] == MAX_PAUSE_S
    assert Follower(a.registry, a.head, jitter=lambda: 0.0).round() == pauses[0] / 2
    redis_server.start()
    assert a.follower.round() == 0
    redis_server.kill()
    assert a.follower.round() == pauses[0]


def test_a_publication_is_heard_by_the_next_round(replica: Callable[..., Replica]) -> None:
    a, b = replica(), replica()
    a.registry.publish(new())
    assert b.knows("fr") == 0
    b.follower.round()
    assert b.knows("fr") == 1
    set_alias(a.registry, "fr", "prod", 1)
    a.registry.delete("fr", now=1)
    b.follower.round()
    assert b.registry.everything() == a.registry.everything()


def test_what_redis_forgets_is_told_again(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    a, b = replica(), replica()
    a.registry.publish(new())
    with redis_server.client() as client:
        client.flushall()
    assert a.head.top() == -1
    a.follower.round()
    assert a.head.top() == a.registry.number == 1
    b.follower.round()
    assert b.registry.publish(new()).version == 2


def test_a_number_is_not_given_again_after_redis_lost_the_last_changes(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a, b = replica(), replica()
    for _ in range(3):
        a.registry.publish(new())
    with redis_server.client() as client:
        key = f"chorale:{a.registry.store_id}:head"
        client.delete(key)
        client.xadd(key, {"v": "1"}, id="1-0")
    assert b.registry.publish(new()).version == 4
    assert a.head.top() == 4


def test_redis_that_dies_after_the_journal_loses_nothing(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a, b = replica(), replica()
    announce = a.head.announce

    def killed_first(number: int) -> None:
        redis_server.kill()
        announce(number)

    a.head.announce = killed_first  # type: ignore[method-assign]
    assert a.registry.publish(new()).version == 1
    # also without Redis, and without anybody who remembers it
    assert b.follower.round() > 0 and b.registry.is_away
    assert b.follower.look() <= 0.2 and b.knows("fr") == 1
    redis_server.start()
    assert replica().registry.publish(new()).version == 2


def test_redis_ahead_of_the_folder_stops_changes_and_removals(replica: Callable[..., Replica]) -> None:
    a = replica()
    a.registry.publish(new())
    a.head.announce(9)
    with pytest.raises(RegistryUnavailable, match=r"change 9, .* shows 1 .*store rebuild"):
        a.registry.publish(new())
    with pytest.raises(RegistryUnavailable, match="change 9"):
        a.registry.digests(retired_since=0)
    assert a.follower.round() > 0 and a.knows("fr") == 1
    a.head.forget()
    assert a.registry.publish(new()).version == 2


def test_who_is_far_behind_goes_on_at_the_checkpoint(replica: Callable[..., Replica]) -> None:
    a, b = replica(), replica()
    for letter in "abc":
        a.registry.publish(new(digest=letter))
    set_alias(a.registry, "fr", "prod", 2)
    a.registry.publish(new("de", "d"))
    a.registry.delete("de", now=50)
    assert a.registry.fold(retired_since=60) == 6
    assert a.registry.publish(new("DE")).version == 2
    b.follower.round()
    assert b.registry.everything() == replica().registry.everything() == a.registry.everything()
    # what retired long ago is forgotten with the changes
    assert b.registry.digests(retired_since=0) == {letter * 64 for letter in "abc"}
    assert a.registry.fold(retired_since=0) == 2
    assert b.registry.publish(new()).version == 4


def test_threads_hear_at_once_through_kills_and_freezes(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a, b = replica(wait_s=0.2), replica(wait_s=0.2)
    for each in (a, b):
        each.follower.start()
    a.registry.publish(new())
    until(lambda: b.knows("fr") == 1, "heard")
    redis_server.kill()
    until(lambda: a.registry.is_away and b.registry.is_away, "away")
    redis_server.start()
    until(lambda: not a.registry.is_away and not b.registry.is_away, "back")
    assert b.registry.publish(new()).version == 2
    until(lambda: a.knows("fr") == 2, "heard again")


def test_who_is_held_up_by_redis_hears_of_publications_all_the_same(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a, b = replica(), replica(wait_s=0.2)
    wait, is_held, is_over = b.head.wait, threading.Event(), threading.Event()

    def frozen(after: int) -> None:
        is_held.set()
        is_over.wait(600.0)
        wait(after)

    b.head.wait = frozen  # type: ignore[method-assign]
    b.follower.start()
    try:
        assert is_held.wait(120.0)
        a.registry.publish(new())
        until(lambda: b.knows("fr") == 1, "seen by the eye while the ear was held up")
    finally:
        is_over.set()


def test_a_redis_that_freezes_before_it_is_told_holds_nobody_up(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    a, b = replica(), replica()
    is_asked, is_over = threading.Event(), threading.Event()

    def frozen(number: int) -> None:
        is_asked.set()
        is_over.wait(600.0)

    a.head.announce = frozen  # type: ignore[method-assign]
    publishing = threading.Thread(target=lambda: a.registry.publish(new()))
    publishing.start()
    try:
        assert is_asked.wait(120.0)
        # neither the journal's lock nor a reader waits for what Redis is told
        assert b.registry.publish(new("de")).version == 1
        a.follower.look()
        assert a.knows("de") == 1 and b.knows("fr") == 1
    finally:
        is_over.set()
        publishing.join()


def test_a_mistake_of_ours_does_not_make_a_replica_deaf(
    replica: Callable[..., Replica], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = replica(wait_s=0.05), replica()
    catch_up, is_called = a.registry.catch_up, threading.Event()

    def fails_once() -> None:
        if not is_called.is_set():
            is_called.set()
            raise RuntimeError("planted")
        catch_up()

    a.registry.catch_up = fails_once  # type: ignore[method-assign]
    a.follower.start()
    assert is_called.wait(120.0)
    b.registry.publish(new())
    until(lambda: a.knows("fr") == 1, "heard after the mistake")
    assert "planted" in caplog.text


def test_the_acl_line_allows_all_that_a_replica_does_and_nothing_else(
    redis_server: RedisServer, replica: Callable[..., Replica]
) -> None:
    with redis_server.client() as client:
        client.execute_command(*acl_line("chorale").replace("PASSWORD", "s3cret").split())
        url = redis_server.url_of("chorale", "s3cret")
        a, b = replica(url), replica(url)
        a.registry.publish(new())
        b.follower.round()
        assert b.knows("fr") == 1
        set_alias(a.registry, "fr", "prod", 1)
        a.head.forget()
        a.follower.round()
        assert b.follower.round() == 0 and b.registry.number == 2 == a.head.top()
        b.registry.delete("fr", now=1)
        for command in (
            ("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("EVAL", "return 1", "0"), ("GET", "chorale:x"),
            ("ACL", "LIST"), ("XADD", "other", "*", "v", "1"), ("DEL", "other"), ("SUBSCRIBE", "x"), ("INFO",),
        ):  # fmt: skip
            with pytest.raises(NoPermissionError):
                a.head._commands.execute_command(*command)  # type: ignore[no-untyped-call]
        # every command is needed: without any one of them something fails
        for needed in COMMANDS:
            client.execute_command("ACL", "SETUSER", "chorale", f"-{needed}")
            with pytest.raises(RegistryUnavailable) as refused:
                a.head.top()
                a.head.wait(99)
                a.head.announce(99)
                a.head.forget()
            assert is_refused(refused.value)
            client.execute_command("ACL", "SETUSER", "chorale", f"+{needed}")


def test_a_wrong_password_is_told_from_silence(redis_server: RedisServer, replica: Callable[..., Replica]) -> None:
    with redis_server.client() as client:
        client.execute_command(*acl_line("chorale").replace("PASSWORD", "s3cret").split())
    with pytest.raises(RegistryUnavailable) as refused:
        replica(redis_server.url_of("chorale", "wr0ng")).registry.publish(new())
    assert is_refused(refused.value)
    redis_server.kill()
    with pytest.raises(RegistryUnavailable) as silent:
        replica().registry.publish(new())
    assert not is_refused(silent.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:s3cret@host:6379/0", "redis://user:***@host:6379/0"),
        ("rediss://:s3cret@[::1]:6379", "rediss://:***@[::1]:6379"),
        ("redis://host", "redis://host"),
        ("unix://user:s3cret@/run/redis.sock?db=1", "unix://user:***@/run/redis.sock?***"),
        ("redis://host?password=s3cret", "redis://host?***"),
        ("redis://:s3@cret@host", "redis://:***@host"),
        ("redis://:s3cret@[broken", "***"),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize("url", ["http://host", "host:6379", "", "redis://:s3cret@host:port"])
def test_a_url_of_another_kind_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidOption, match=r"cannot be used; it looks like redis://") as refused:
        RedisHead(url, "id")
    assert "s3cret" not in str(refused.value)

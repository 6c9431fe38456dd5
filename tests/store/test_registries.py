"""What every registry promises, the same suite for each: SQLite in a file, and a journal with a real Redis."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFound, NameTaken, StoreError
from adapters_store.redis_head import RedisHead
from adapters_store.registry import Registry, find_version
from adapters_store.registry_redis import SharedRegistry
from adapters_store.registry_sqlite import SqliteRegistry
from tests.redis_server import RedisServer
from tests.store.registry_cases import NEW, new, open_alone, set_alias

Open = Callable[[], Registry]


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """Return a real Redis."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "redis"])
def open_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Hand out a function that opens the same registry once more, as another process would."""
    with ExitStack() as opened:

        def open_sqlite() -> Registry:
            registry = SqliteRegistry(tmp_path / "registry.sqlite")
            opened.callback(registry.close)
            return registry

        def open_redis() -> Registry:
            registry = SharedRegistry.open(tmp_path)
            registry.connect(RedisHead(server.url, registry.store_id, timeout_s=120.0))
            opened.callback(registry.close)
            return registry

        if request.param == "sqlite":
            yield open_sqlite
        else:
            server: RedisServer = request.getfixturevalue("redis_server")
            yield open_redis


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    """Return an empty registry."""
    return open_registry()


def test_a_case_twin_is_refused_until_the_name_is_gone(registry: Registry) -> None:
    registry.publish(new("Fr"))
    for attempt in (lambda: registry.check_free("fR"), lambda: registry.publish(new("fr"))):
        with pytest.raises(NameTaken, match="'Fr'"):
            attempt()
    assert [version.name for version in registry.all_current()] == ["Fr"]
    registry.delete("Fr", now=5)
    assert registry.publish(new("fr")).version == 2


def test_a_name_that_is_an_alias_is_refused_and_the_other_way_round(registry: Registry) -> None:
    registry.publish(new("fr"))
    set_alias(registry, "fr", "prod", 1)
    with pytest.raises(NameTaken, match="alias 'prod'"):
        registry.publish(new("fr:prod"))
    registry.publish(new("fr:beta"))
    with pytest.raises(NameTaken, match="'fr:beta'"):
        set_alias(registry, "fr", "beta", 1)
    assert registry.aliased("fr", "beta") is None


def test_an_alias_needs_a_version_that_is_there(registry: Registry) -> None:
    with pytest.raises(AdapterNotFound, match="there is no adapter 'fr'"):
        set_alias(registry, "fr", "prod", 1)
    registry.publish(new())
    with pytest.raises(AdapterNotFound, match="no version 2"):
        set_alias(registry, "fr", "prod", 2)
    assert registry.aliased("fr", "prod") is None


def test_what_is_not_there_is_none(registry: Registry) -> None:
    registry.publish(new())
    assert registry.current("FR") is None and registry.current("") is None
    assert registry.version("fr", 2) is None and registry.version("fr", 0) is None
    assert registry.aliased("fr", "prod") is None and registry.versions("xx") == []
    registry.delete("xx", now=1)
    assert [version.version for version in registry.versions("fr")] == [1]


def test_a_number_is_never_given_again(registry: Registry, open_registry: Open) -> None:
    assert [registry.publish(new(digest=digest)).version for digest in "abc"] == [1, 2, 3]
    registry.delete("fr", now=5)
    assert registry.current("fr") is None and registry.versions("fr") == []
    assert open_registry().publish(new("FR")).version == 4


def test_everything_comes_back_as_it_was_published(registry: Registry, open_registry: Open) -> None:
    published = [registry.publish(new(digest=digest)) for digest in "ab"]
    registry.publish(replace(new("de"), proof=None, not_probed="why", invocation_tokens=()))
    for each in (registry, open_registry()):
        assert each.versions("fr") == published
        assert each.current("fr") == published[1] and each.version("fr", 1) == published[0]
        assert [version.name for version in each.all_current()] == ["de", "fr"]
    assert published[0].report == NEW.report and published[0].proof == NEW.proof
    assert published[0].base == NEW.base and published[0].invocation_tokens == (5, 7)


def test_an_alias_moves_and_goes_with_its_name(registry: Registry) -> None:
    for digest in "ab":
        registry.publish(new(digest=digest))
    for number in (1, 2, 1):
        set_alias(registry, "fr", "prod", number)
        assert registry.aliased("fr", "prod") == registry.version("fr", number)
    registry.publish(new("fr2"))
    set_alias(registry, "fr2", "prod", 1)
    registry.delete("fr", now=5)
    registry.publish(new())
    assert registry.aliased("fr", "prod") is None
    assert registry.aliased("fr2", "prod") is not None


def test_digests_are_kept_while_pointed_to_or_recently_retired(registry: Registry, open_registry: Open) -> None:
    registry.publish(new("fr", "a"))
    registry.publish(new("fr", "b"))
    registry.publish(new("de", "b"))
    registry.delete("fr", now=100)
    assert registry.digests(retired_since=100) == {"a" * 64, "b" * 64}
    assert open_registry().digests(retired_since=101) == {"b" * 64}


def test_selectors_find_the_same_in_every_registry(registry: Registry) -> None:
    for digest in "aba":
        registry.publish(new(digest=digest))
    set_alias(registry, "fr", "prod", 2)
    found = {
        model: version.version if (version := find_version(registry, model)) else None
        for model in (
            "fr",
            "fr@1",
            "fr@9",
            f"fr@sha256:{'a' * 64}",
            f"fr@sha256:{'c' * 64}",
            "fr:prod",
            "fr:no",
            ":prod",
        )
    }
    assert [*found.values()] == [3, 1, None, 3, None, 2, None, None]


def test_publications_from_many_sides_get_distinct_numbers(open_registry: Open) -> None:
    sides = [open_registry() for _ in range(3)]
    numbers: list[int] = []

    def publish(side: Registry) -> None:
        numbers.extend(side.publish(new()).version for _ in range(8))

    threads = [threading.Thread(target=publish, args=(side,)) for side in sides for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 49))
    assert [version.version for version in open_registry().versions("fr")] == list(range(1, 49))


def test_random_changes_leave_both_registries_alike(tmp_path: Path) -> None:
    choose = random.Random(11)
    embedded = SqliteRegistry(tmp_path / "registry.sqlite")
    shared, behind = open_alone(tmp_path / "shared"), open_alone(tmp_path / "shared")
    for step in range(150):
        name, number = choose.choice(["fr", "Fr", "de", "de:prod"]), choose.randrange(1, 5)
        kind = choose.choice(["publish"] * 4 + ["alias"] * 3 + ["delete"])
        answers = [_answer(registry, kind, name, number, step) for registry in (embedded, shared)]
        assert answers[0] == answers[1], (step, kind, name)
        if choose.random() < 0.05:
            shared.fold(retired_since=0)
        if choose.random() < 0.1:
            # one that was behind goes on, and the other is opened again
            behind.catch_up()
            shared, behind = behind, open_alone(tmp_path / "shared")
        assert shared.all_current() == embedded.all_current()
    for name in ("fr", "Fr", "de", "de:prod"):
        assert shared.versions(name) == embedded.versions(name)
        assert shared.aliased(name, "prod") == embedded.aliased(name, "prod")
    for since in (0, 80, 140):
        assert shared.digests(retired_since=since) == embedded.digests(retired_since=since)
    embedded.close()


def _answer(registry: Registry, kind: str, name: str, number: int, now: int) -> object:
    try:
        if kind == "publish":
            return registry.publish(new(name, "0123456789abcdef"[now % 16]))
        if kind == "alias":
            return set_alias(registry, name, "prod", number)  # type: ignore[func-returns-value]
        return registry.delete(name, now=now)  # type: ignore[func-returns-value]
    except StoreError as error:
        return error.message

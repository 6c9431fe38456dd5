"""The operator's pins in the store's file: over restarts, at all servers of a folder, whatever one cannot hold."""

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import obstore
import pytest
from obstore.store import MemoryStore

from adapters_store.errors import AdapterNotFound, StorageFailed, StoreAway
from adapters_store.pins import PINS_FILE, PinsFile, PinStore
from adapters_store.shared_pins import SharedPins
from serve.api import pin_keeper
from serve.api.pin_keeper import PinKeeper
from serve.errors import ServeError
from tests.api.fake_engine import FakeEngine
from tests.memory_objects import memory_journal

A, B, C = "a" * 64, "b" * 64, "c" * 64


def anything(digest: str) -> None:
    """Let every adapter be served."""


class Pinned:
    """The pins of one store, as any of its servers sees them: in a file, or in an object store."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Take a place for them."""
        self._folder = folder
        self._memory = MemoryStore()
        self._kind = kind

    def __call__(self) -> PinStore:
        """Return one more server's view."""
        return PinsFile(self._folder) if self._kind == "file" else SharedPins(memory_journal(self._memory, "pins"))


@pytest.fixture(params=["file", "objects"])
def pinned(request: pytest.FixtureRequest, tmp_path: Path) -> Pinned:
    return Pinned(tmp_path, request.param)


def keeper_of(pins: PinStore, engine: FakeEngine, check: Callable[[str], None] = anything) -> PinKeeper:
    """Return one server's keeper."""
    return PinKeeper(pins, engine, check)


def run(work: Awaitable[None]) -> None:
    """Run to the end."""

    async def whole() -> None:
        await work

    asyncio.run(whole())


def test_pins_are_there_again_after_a_restart_in_their_order(pinned: Pinned) -> None:
    async def first_life() -> None:
        keeper = keeper_of(pinned(), FakeEngine())
        for digest in (C, A, B, A):
            await keeper.pin(digest)
        await keeper.unpin(A)

    async def second_life() -> None:
        engine = FakeEngine(is_ready=False)
        keeper = keeper_of(pinned(), engine)
        await keeper._round()
        assert engine.asked == []
        engine.is_ready = True
        await keeper._round()
        assert engine.desk.pinned == (C, B)
        num_asked = len(engine.asked)
        await keeper._round()
        assert len(engine.asked) == num_asked, "what is pinned is not asked for again"

    run(first_life())
    run(second_life())


def test_a_refused_pin_is_not_kept(pinned: Pinned) -> None:
    async def refused() -> None:
        keeper = keeper_of(pinned(), FakeEngine(operator_refusal="no room"))
        with pytest.raises(ServeError, match="no room"):
            await keeper.pin(A)

    run(refused())
    assert pinned().read() == ()


def test_servers_of_one_store_hold_the_same_pins(pinned: Pinned) -> None:
    async def both() -> None:
        engines = FakeEngine(), FakeEngine()
        one, other = (keeper_of(pinned(), engine) for engine in engines)
        await one.pin(A)
        await other.pin(B)
        for keeper in (one, other):
            await keeper._round()
        assert {engine.desk.pinned for engine in engines} == {(A, B), (B, A)}
        await other.unpin(A)
        await one.forget([B])
        for keeper in (one, other):
            await keeper._round()
        assert [engine.desk.pinned for engine in engines] == [(), ()]

    run(both())


def test_what_cannot_be_held_here_stops_nothing_else_and_is_tried_again(
    pinned: Pinned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pin_keeper, "_RETRY_S", 0.0)
    missing = {A}

    def check(digest: str) -> None:
        if digest in missing:
            raise AdapterNotFound("no such adapter")

    async def rounds() -> None:
        for digest in (A, B):
            pinned().add(digest)
        engine = FakeEngine()
        keeper = keeper_of(pinned(), engine, check)
        await keeper._round()
        assert engine.desk.pinned == (B,) and pinned().read() == (A, B)
        missing.clear()
        await keeper._round()
        assert set(engine.desk.pinned) == {A, B}

    run(rounds())


@pytest.mark.parametrize("content", ["", "[]", '{"pins": 3}', '{"pins": ["x"]}', '{"pins": [], "more": 1}', "\x00"])
def test_a_damaged_file_is_named_changes_nothing_and_loses_no_pin_that_is_held(tmp_path: Path, content: str) -> None:
    async def with_damage() -> None:
        engine = FakeEngine()
        keeper = keeper_of(PinsFile(tmp_path), engine)
        await keeper.pin(A)
        (tmp_path / PINS_FILE).write_text(content)
        with pytest.raises(StorageFailed, match="remove it"):
            await keeper._round()
        with pytest.raises(StorageFailed):
            await keeper.pin(B)
        assert A in engine.desk.pinned and (tmp_path / PINS_FILE).read_text() == content

    run(with_damage())


class LostAnswer(SharedPins):
    """Pins of which one more can be written no more."""

    def add(self, digest: str) -> None:
        """Fail as an object store does that went away."""
        raise StoreAway


def test_a_pin_that_could_not_be_kept_is_taken_back() -> None:
    async def cut_off() -> None:
        engine = FakeEngine()
        keeper = keeper_of(LostAnswer(memory_journal(MemoryStore(), "pins")), engine)
        await keeper._round()
        with pytest.raises(StoreAway):
            await keeper.pin(A)
        await keeper._round()
        assert engine.desk.pinned == ()

    run(cut_off())


def test_pins_made_at_the_same_moment_all_count_and_old_entries_go(pinned: Pinned) -> None:
    servers = [pinned() for _ in range(3)]
    # a file is written anew each time
    most = 60 if isinstance(servers[0], SharedPins) else 6
    threads = [threading.Thread(target=pin_many, args=(server, number, most)) for number, server in enumerate(servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {digest_of(server, number) for server in range(3) for number in range(0, most, 2)}
    for server in (*servers, pinned()):
        pins = server.read()
        assert len(pins) == len(expected) and set(pins) == expected
    if isinstance(servers[0], SharedPins):
        assert len(servers[0]._journal.numbers()) < 200


def digest_of(server: int, number: int) -> str:
    """Return some adapter's digest."""
    return f"{1000 * server + number:064x}"


def pin_many(pins: PinStore, server: int, most: int) -> None:
    """Pin so many adapters, and every other one no more."""
    for number in range(most):
        pins.add(digest_of(server, number))
        if number % 2:
            pins.discard([digest_of(server, number)])


@pytest.mark.parametrize("harm", ["altered", "another form", "exchanged"])
def test_a_damaged_journal_of_pins_is_named(harm: str) -> None:
    memory = MemoryStore()
    pins = SharedPins(memory_journal(memory, "pins"))
    for digest in (A, B, C):
        pins.add(digest)
    keys = [f"pins/{number:012d}" for number in (1, 2)]
    first, second = (bytes(obstore.get(memory, key).bytes()) for key in keys)
    if harm == "altered":
        obstore.put(memory, keys[0], first.replace(A.encode(), B.encode()))
    elif harm == "exchanged":
        obstore.put(memory, keys[0], second)
        obstore.put(memory, keys[1], first)
    else:
        payload = b'{"before":"x","number":1,"pins":["x"]}'
        obstore.put(memory, keys[0], hashlib.sha256(payload).hexdigest().encode() + b" " + payload + b"\n0")
    with pytest.raises(StorageFailed, match="change 1"):
        SharedPins(memory_journal(memory, "pins"))

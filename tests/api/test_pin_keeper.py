"""The operator's pins in the store's file: over restarts, at all servers of a folder, whatever one cannot hold."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from adapters_store.errors import AdapterNotFound, StorageFailed
from adapters_store.pins import PINS_FILE, PinsFile
from serve.api import pin_keeper
from serve.api.pin_keeper import PinKeeper
from serve.errors import ServeError
from tests.api.fake_engine import FakeEngine

A, B, C = "a" * 64, "b" * 64, "c" * 64


def anything(digest: str) -> None:
    """Let every adapter be served."""


def keeper_of(folder: Path, engine: FakeEngine, check: Callable[[str], None] = anything) -> PinKeeper:
    """Return one server's keeper."""
    return PinKeeper(PinsFile(folder), engine, check)


def run(work: Awaitable[None]) -> None:
    """Run to the end."""

    async def whole() -> None:
        await work

    asyncio.run(whole())


def test_pins_are_there_again_after_a_restart_in_their_order(tmp_path: Path) -> None:
    async def first_life() -> None:
        keeper = keeper_of(tmp_path, FakeEngine())
        for digest in (C, A, B, A):
            await keeper.pin(digest)
        await keeper.unpin(A)

    async def second_life() -> None:
        engine = FakeEngine(is_ready=False)
        keeper = keeper_of(tmp_path, engine)
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


def test_a_refused_pin_is_not_kept(tmp_path: Path) -> None:
    async def refused() -> None:
        keeper = keeper_of(tmp_path, FakeEngine(operator_refusal="no room"))
        with pytest.raises(ServeError, match="no room"):
            await keeper.pin(A)

    run(refused())
    assert PinsFile(tmp_path).read() == ()


def test_servers_of_one_folder_hold_the_same_pins(tmp_path: Path) -> None:
    async def both() -> None:
        engines = FakeEngine(), FakeEngine()
        one, other = (keeper_of(tmp_path, engine) for engine in engines)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pin_keeper, "_RETRY_S", 0.0)
    missing = {A}

    def check(digest: str) -> None:
        if digest in missing:
            raise AdapterNotFound("no such adapter")

    async def rounds() -> None:
        for digest in (A, B):
            PinsFile(tmp_path).add(digest)
        engine = FakeEngine()
        keeper = keeper_of(tmp_path, engine, check)
        await keeper._round()
        assert engine.desk.pinned == (B,) and PinsFile(tmp_path).read() == (A, B)
        missing.clear()
        await keeper._round()
        assert set(engine.desk.pinned) == {A, B}

    run(rounds())


@pytest.mark.parametrize("content", ["", "[]", '{"pins": 3}', '{"pins": ["x"]}', '{"pins": [], "more": 1}', "\x00"])
def test_a_damaged_file_is_named_changes_nothing_and_loses_no_pin_that_is_held(tmp_path: Path, content: str) -> None:
    async def with_damage() -> None:
        engine = FakeEngine()
        keeper = keeper_of(tmp_path, engine)
        await keeper.pin(A)
        (tmp_path / PINS_FILE).write_text(content)
        with pytest.raises(StorageFailed, match="remove it"):
            await keeper._round()
        with pytest.raises(StorageFailed):
            await keeper.pin(B)
        assert A in engine.desk.pinned and (tmp_path / PINS_FILE).read_text() == content

    run(with_damage())

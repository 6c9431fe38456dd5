"""Keys and grants that replicas share through a journal: heard everywhere without Redis, taken over, damaged."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.journal import Journal, LinkingFileSystem
from adapters_store.registry_redis import SharedRegistry
from serve.errors import StartError, Unavailable
from serve.tenants.key_changes import KeyChange, KeyEntry, read_entry, write_entry
from serve.tenants.key_ring import MAX_AGE_S, KeyRing
from serve.tenants.key_store import EVERYBODY, Grant
from serve.tenants.key_store_choice import holds_keys, open_key_store
from serve.tenants.key_store_journal import JournalKeyStore
from serve.tenants.key_store_sqlite import SqliteKeyStore
from serve.tenants.keys import KeyRecord, mint
from serve.tenants.principal import Scope

PEPPER = b"p" * 32
FOLD = 4
SCOPES = frozenset({Scope.INFER, Scope.ADAPTERS_READ})


def new_key(tenant: str = "acme") -> tuple[str, KeyRecord]:
    return mint(tenant, SCOPES, PEPPER, now=1000, expires=None)


def open_one(folder: Path, pepper: bytes = PEPPER) -> JournalKeyStore:
    return JournalKeyStore(Journal(folder / "keys", LinkingFileSystem()), pepper)


def test_a_key_revoked_by_one_replica_is_dead_on_all_within_a_second(tmp_path: Path) -> None:
    now = 1000.0
    stores = [open_one(tmp_path) for _ in range(3)]
    rings = [KeyRing(store, PEPPER, monotonic=lambda: now, clock=lambda: now) for store in stores]
    text, record = new_key()
    stores[0].add(record)
    for ring in rings:
        ring.refresh()
        assert ring.authenticate(text) is not None
    stores[2].revoke(record.key_id, now=1000)
    now += MAX_AGE_S
    for ring in rings:
        # there is nothing in this test but the folder: no Redis, and nobody who tells
        assert ring.is_stale and MAX_AGE_S < 1
        ring.refresh()
        assert ring.authenticate(text) is None


def test_replicas_agree_on_what_all_of_them_changed(tmp_path: Path) -> None:
    stores = [open_one(tmp_path) for _ in range(3)]
    records = [new_key(f"tenant{number}")[1] for number in range(24)]

    def change(store: JournalKeyStore, mine: list[KeyRecord]) -> None:
        for record in mine:
            store.add(record)
            store.grant(Grant(f"{record.tenant}/a", EVERYBODY))
            store.grant(Grant("shared", record.tenant))
            store.revoke(record.key_id, now=1500)

    threads = [threading.Thread(target=change, args=(stores[n], records[n::3])) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshots = [store.snapshot() for store in (*stores, open_one(tmp_path))]
    assert snapshots[1:] == snapshots[:-1] and snapshots[0].version == 4 * len(records)
    assert {record.key_id: record for record in snapshots[0].records} == {
        record.key_id: replace(record, revoked=1500) for record in records
    }
    assert len(snapshots[0].grants) == 2 * len(records)
    assert stores[1].withdraw("shared", "tenant3") == 1 and stores[2].withdraw("shared", "tenant3") == 0
    assert stores[0].withdraw("shared", None) == len(records) - 1
    assert {grant.adapter for grant in stores[2].snapshot().grants} == {f"tenant{n}/a" for n in range(24)}


def journal_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "keys").iterdir() if path.name.isdecimal())


def open_folding(folder: Path) -> JournalKeyStore:
    return JournalKeyStore(Journal(folder / "keys", LinkingFileSystem()), PEPPER, fold_changes=FOLD)


def test_a_folded_journal_keeps_every_key_grant_and_revocation(tmp_path: Path) -> None:
    stores = [open_folding(tmp_path) for _ in range(2)]
    behind = open_one(tmp_path)
    revoked, kept = new_key()[1], new_key("kept")[1]
    for record in (revoked, kept):
        stores[0].add(record)
    stores[1].revoke(revoked.key_id, now=1500)
    stores[1].grant(Grant("acme/kept", EVERYBODY))
    versions = [behind.version()]
    for number in range(12 * FOLD):
        store = stores[number % 2]
        grant = Grant("acme/a", f"tenant{number % 3}")
        if store.withdraw(grant.adapter, grant.tenant) == 0:
            store.grant(grant)
        if number % (3 * FOLD) == 0:
            # behind by more than what is kept
            versions.append(behind.version())
    assert versions == sorted(set(versions))
    # two folds' worth of changes, the folds themselves, and the first entry, which stays
    assert len(journal_files(tmp_path)) <= 2 * FOLD + 4
    snapshots = [store.snapshot() for store in (*stores, behind, open_one(tmp_path))]
    assert snapshots[1:] == snapshots[:-1]
    assert set(snapshots[0].records) == {replace(revoked, revoked=1500), kept}
    assert set(snapshots[0].grants) == {Grant("acme/kept", EVERYBODY)}
    with pytest.raises(StartError, match="pepper"):
        open_one(tmp_path, b"q" * 32)


def test_whoever_looks_every_second_never_lacks_the_next_change(tmp_path: Path) -> None:
    writer, looker = open_folding(tmp_path), open_one(tmp_path)
    for number in range(8 * FOLD):
        seen = looker.version()
        if number % 2:
            writer.withdraw("acme/a", EVERYBODY)
        else:
            writer.grant(Grant("acme/a", EVERYBODY))
        # the very next entry is there, whatever was folded: no second is lost with looking for a checkpoint
        assert (tmp_path / "keys" / f"{seen + 1:012d}").is_file()
    assert int(journal_files(tmp_path)[1].name) > 2 * FOLD, "nothing was folded"


def test_a_journal_that_only_grows_is_folded_as_well(tmp_path: Path) -> None:
    store = open_folding(tmp_path)
    for number in range(16 * FOLD):
        store.grant(Grant("acme/a", f"tenant{number}"))
    assert int(journal_files(tmp_path)[1].name) > 8 * FOLD
    assert len(open_one(tmp_path).snapshot().grants) == 16 * FOLD


@pytest.mark.parametrize("is_altered", [False, True])
def test_a_fold_that_is_gone_or_altered_opens_nothing(tmp_path: Path, is_altered: bool) -> None:
    store = open_folding(tmp_path)
    store.grant(Grant("acme/a", "tenant0"))
    for _ in range(2 * FOLD):
        store.grant(Grant("acme/a", "other"))
        store.withdraw("acme/a", "other")
    fold = journal_files(tmp_path)[1]
    assert b'"everything":true' in fold.read_bytes()
    if is_altered:
        fold.write_bytes(fold.read_bytes().replace(b"tenant0", b"tenant9"))
    else:
        fold.unlink()
    with pytest.raises(Unavailable):
        open_one(tmp_path)


def test_what_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    store = open_one(tmp_path)
    store.grant(Grant("a", "bob"))
    version = store.version()
    store.grant(Grant("a", "bob"))
    assert store.withdraw("a", "eve") == 0 and store.version() == version


def test_an_id_is_given_once_among_replicas(tmp_path: Path) -> None:
    one, other = open_one(tmp_path), open_one(tmp_path)
    _, record = new_key()
    one.add(record)
    with pytest.raises(Unavailable):
        other.add(replace(record, tenant="other"))
    assert other.snapshot().records == (record,)


def test_an_entry_reads_as_it_was_written() -> None:
    change = KeyChange(
        records=(new_key()[1], replace(new_key("bob")[1], expires=5, revoked=7)),
        granted=(Grant("acme/fr", "bob"), Grant("x", EVERYBODY)),
        withdrawn=(Grant("y", "eve"),),
        pepper_mark="00ff",
    )
    entry = KeyEntry(7, "ab" * 32, change)
    assert read_entry(write_entry(entry), 7) == entry


def flip(data: bytes) -> bytes:
    return data[:90] + bytes([data[90] ^ 1]) + data[91:]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: b"", lambda data: data[:100]],
    ids=["flipped", "emptied", "cut"],
)
def test_a_damaged_entry_opens_nothing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = open_one(tmp_path)
    store.add(new_key()[1])
    path = tmp_path / "keys" / "000000000001"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Unavailable):
        open_one(tmp_path)


def test_an_entry_of_another_store_does_not_fit(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        for _ in range(2):
            open_one(folder).add(new_key()[1])
    (one / "keys" / "000000000002").write_bytes((other / "keys" / "000000000002").read_bytes())
    with pytest.raises(Unavailable):
        open_one(one)


def test_a_lost_entry_is_not_written_anew(tmp_path: Path) -> None:
    ahead, behind = open_one(tmp_path), open_one(tmp_path)
    _, record = new_key()
    ahead.add(record)
    ahead.revoke(record.key_id, now=1500)
    (tmp_path / "keys" / "000000000001").unlink()
    with pytest.raises(Unavailable):
        behind.add(new_key()[1])
    assert not (tmp_path / "keys" / "000000000001").exists()


def test_a_store_that_comes_to_be_shared_keeps_its_keys(tmp_path: Path) -> None:
    text, record = new_key()
    alone = open_key_store(tmp_path, PEPPER)
    assert isinstance(alone, SqliteKeyStore)
    alone.add(record)
    alone.grant(Grant("acme/fr", "bob"))
    alone.close()
    SharedRegistry.open(tmp_path)
    opened: list[JournalKeyStore] = []

    def take_over() -> None:
        store = open_key_store(tmp_path, PEPPER)
        assert isinstance(store, JournalKeyStore)
        opened.append(store)

    threads = [threading.Thread(target=take_over) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for store in opened:
        snapshot = store.snapshot()
        assert (snapshot.records, snapshot.grants) == ((record,), (Grant("acme/fr", "bob"),))
    assert holds_keys(tmp_path) and not (tmp_path / "keys.sqlite").exists()
    assert (tmp_path / "keys.sqlite.before-1").is_file() and text


def test_a_take_over_that_was_cut_short_is_ended_and_foreign_keys_are_named(tmp_path: Path) -> None:
    _, record = new_key()
    old = SqliteKeyStore(tmp_path / "keys.sqlite", PEPPER)
    old.add(record)
    # the journal has them, the file was not renamed yet
    open_one(tmp_path).add(record)
    open_key_store(tmp_path, PEPPER)
    assert not (tmp_path / "keys.sqlite").exists()
    other = SqliteKeyStore(tmp_path / "keys.sqlite", PEPPER)
    _, foreign = new_key()
    other.add(foreign)
    with pytest.raises(StartError, match=foreign.key_id):
        open_key_store(tmp_path, PEPPER)
    assert (tmp_path / "keys.sqlite").is_file()
    old.close()
    other.close()

"""Keys on the disk and in the processes that use them: durability, revocation, rotation, failing disks, peppers."""

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.journal import Journal, LinkingFileSystem
from serve.errors import StartError, Unavailable
from serve.tenants.key_ring import MAX_AGE_S, KeyRing
from serve.tenants.key_store import KeyNotFound, KeyStore
from serve.tenants.key_store_journal import JournalKeyStore
from serve.tenants.key_store_sqlite import SqliteKeyStore
from serve.tenants.keys import KeyRecord, mint
from serve.tenants.pepper import read_pepper, tenant_salt
from serve.tenants.principal import Scope
from tests.live_server import REPO_ROOT

PEPPER = b"p" * 32
INFER = frozenset({Scope.INFER})


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", "journal"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[KeyStore]:
    opened: KeyStore
    if request.param == "sqlite":
        opened = SqliteKeyStore(tmp_path / "keys.sqlite", PEPPER)
    else:
        opened = JournalKeyStore(Journal(tmp_path / "keys", LinkingFileSystem()), PEPPER)
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def new_key(*, tenant: str = "acme", expires: int | None = None) -> tuple[str, KeyRecord]:
    return mint(tenant, INFER, PEPPER, now=1000, expires=expires)


def add_and_die(path: str, key_id: str, mac: str) -> None:
    """Add a key in a process of its own, which is killed the moment `add` has returned."""
    SqliteKeyStore(Path(path), PEPPER).add(KeyRecord(key_id, "acme", INFER, bytes.fromhex(mac), 1000))
    os.kill(os.getpid(), signal.SIGKILL)


def ring_over(store: KeyStore, clock: Clock) -> KeyRing:
    return KeyRing(store, PEPPER, monotonic=clock, clock=clock)


def test_an_unknown_id_is_refused_by_name_and_changes_nothing(store: KeyStore) -> None:
    before = store.snapshot()
    with pytest.raises(KeyNotFound, match="00ff"):
        store.revoke("00ff", now=1)
    with pytest.raises(KeyNotFound):
        store.rotate("00ff", new_key()[1], until=5)
    assert store.snapshot() == before


def test_an_id_is_given_once(store: KeyStore) -> None:
    _, record = new_key()
    store.add(record)
    with pytest.raises(Unavailable):
        store.add(replace(record, tenant="other"))
    assert store.snapshot().records == (record,)


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "keys.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(Unavailable) as caught:
        SqliteKeyStore(tmp_path / "keys.sqlite", PEPPER)
    assert caught.value.code == "key_store_unavailable" and str(tmp_path) not in caught.value.message


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "keys.sqlite").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        SqliteKeyStore(tmp_path / "keys.sqlite", PEPPER)
    assert not (tmp_path / "elsewhere").exists()


def test_another_pepper_is_refused_at_once(store: KeyStore, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="--pepper-file"):
        if (tmp_path / "keys").exists():
            JournalKeyStore(Journal(tmp_path / "keys", LinkingFileSystem()), b"q" * 32)
        else:
            SqliteKeyStore(tmp_path / "keys.sqlite", b"q" * 32)


def test_only_the_owner_can_read_what_is_kept(store: KeyStore, tmp_path: Path) -> None:
    store.add(new_key()[1])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} <= {0o700}


def test_what_was_acknowledged_is_there_after_the_process_died(tmp_path: Path) -> None:
    path, (text, record) = tmp_path / "keys.sqlite", new_key()
    code = "import sys, os; from tests.tenants.test_key_store import add_and_die; add_and_die(*sys.argv[1:])"
    facts = [str(path), record.key_id, record.mac.hex()]
    child = subprocess.run([sys.executable, "-c", code, *facts], cwd=REPO_ROOT, timeout=240)
    assert child.returncode == -signal.SIGKILL
    reopened = SqliteKeyStore(path, PEPPER)
    assert reopened.snapshot().records == (record,)
    assert text.encode()[20:84] not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    reopened.close()


def test_every_change_raises_the_version_and_no_reading_does(store: KeyStore) -> None:
    (_, first), (_, second) = new_key(), new_key()
    versions = [store.version()]
    for change in (
        lambda: store.add(first),
        lambda: store.rotate(first.key_id, second, until=2000),
        lambda: store.revoke(second.key_id, now=1500),
    ):
        change()
        assert store.version() == store.version() == store.snapshot().version
        versions.append(store.version())
    assert versions == sorted(set(versions))


def test_a_rotation_never_lengthens_a_life(store: KeyStore, clock: Clock) -> None:
    text, old = new_key(expires=1100)
    store.add(old)
    assert store.rotate(old.key_id, new_key()[1], until=5000).expires == 1100
    ring = ring_over(store, clock)
    clock.now = 1100.0
    ring.refresh()
    assert ring.authenticate(text) is None


def test_both_keys_open_while_a_rotation_overlaps(store: KeyStore, clock: Clock) -> None:
    (old_text, old), (text, new) = new_key(), new_key()
    store.add(old)
    store.rotate(old.key_id, new, until=1060)
    ring = ring_over(store, clock)
    for now, opens in ((1000.0, [True, True]), (1059.9, [True, True]), (1060.0, [False, True])):
        clock.now = now
        ring.refresh()
        assert [ring.authenticate(key) is not None for key in (old_text, text)] == opens


def test_a_key_revoked_elsewhere_is_dead_within_a_second(tmp_path: Path, clock: Clock) -> None:
    (text, record), path = new_key(), tmp_path / "keys.sqlite"
    here, elsewhere = SqliteKeyStore(path, PEPPER), SqliteKeyStore(path, PEPPER)
    ring = ring_over(here, clock)
    elsewhere.add(record)
    ring.refresh()
    principal = ring.authenticate(text)
    assert principal is not None and (principal.tenant, principal.scopes) == ("acme", INFER)
    elsewhere.revoke(record.key_id, now=1000)
    assert [ring.is_stale, ring.authenticate(text) is None] == [False, False]
    clock.now += MAX_AGE_S
    assert MAX_AGE_S < 1 and ring.is_stale
    ring.refresh()
    assert ring.authenticate(text) is None
    here.close()
    elsewhere.close()


def test_the_store_is_read_once_for_many_requests(store: KeyStore, clock: Clock) -> None:
    reads: list[int] = []

    class Counting(SqliteKeyStore):
        def __init__(self) -> None:
            pass

        def version(self) -> int:
            reads.append(1)
            return store.version()

        def snapshot(self):  # type: ignore[no-untyped-def]
            reads.append(2)
            return store.snapshot()

    ring = KeyRing(Counting(), PEPPER, monotonic=clock, clock=clock)
    threads = [threading.Thread(target=ring.refresh) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [1, 2]
    clock.now += 10
    ring.refresh()
    assert reads == [1, 2, 1]


def test_a_store_that_fails_opens_nothing(store: KeyStore, clock: Clock, tmp_path: Path) -> None:
    text, record = new_key()
    store.add(record)
    ring = ring_over(store, clock)
    ring.refresh()
    store.close()
    if (tmp_path / "keys").exists():
        (tmp_path / "keys" / "000000000002").write_bytes(b"damaged")
    clock.now += MAX_AGE_S
    with pytest.raises(Unavailable):
        ring.refresh()
    assert ring.is_stale and text


def test_revoking_twice_keeps_the_first_time(store: KeyStore) -> None:
    _, record = new_key()
    store.add(record)
    assert store.revoke(record.key_id, now=1500).revoked == 1500
    assert store.revoke(record.key_id, now=1600).revoked == 1500


def test_a_pepper_that_others_can_read_or_that_is_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    with pytest.raises(StartError, match="No such file"):
        read_pepper(path, create=False)
    path.write_bytes(b"x" * 31)
    path.chmod(0o600)
    with pytest.raises(StartError, match="not 31"):
        read_pepper(path, create=False)
    path.write_bytes(b"x" * 32)
    path.chmod(0o640)
    with pytest.raises(StartError, match="chmod 600"):
        read_pepper(path, create=False)
    path.chmod(0o600)
    assert read_pepper(path, create=False) == b"x" * 32


@pytest.mark.parametrize(("mode", "is_read"), [(0o440, True), (0o400, True), (0o444, False), (0o460, False)])
def test_a_pepper_that_is_mounted_for_our_group_alone_is_read(tmp_path: Path, mode: int, is_read: bool) -> None:
    """As Kubernetes mounts a secret for a pod with a group of its own."""
    path = tmp_path / "pepper"
    path.write_bytes(PEPPER)
    os.chown(path, -1, os.getegid())
    path.chmod(mode)
    if is_read:
        assert read_pepper(path, create=False) == PEPPER
    else:
        with pytest.raises(StartError, match="only its owner"):
            read_pepper(path, create=False)


def test_a_pepper_is_made_once_and_alone(tmp_path: Path) -> None:
    path, found = tmp_path / "pepper", []
    threads = [threading.Thread(target=lambda: found.append(read_pepper(path, create=True))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["pepper"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_salts_differ_by_tenant_and_by_server() -> None:
    salts = {tenant_salt(pepper, tenant) for pepper in (PEPPER, b"q" * 32) for tenant in ("a", "b", "local")}
    assert len(salts) == 6 and tenant_salt(PEPPER, "a") == tenant_salt(PEPPER, "a")

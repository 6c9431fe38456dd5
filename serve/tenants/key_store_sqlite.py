"""The embedded key store: one SQLite file beside the registry, write-ahead log, synchronous=FULL.

Owns the tables and their transactions. Invariant: every change is one transaction, durable before the call returns,
that also raises the version; a file made with another pepper is refused when it is opened, not key by key.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from adapters_store.durable_sqlite import connect, transaction
from serve.errors import Unavailable
from serve.tenants.key_store import Grant, KeySnapshot, ends_by, unknown_key
from serve.tenants.keys import KeyRecord
from serve.tenants.pepper import check_mark, pepper_mark
from serve.tenants.principal import Scope

KEYS_FILE = "keys.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    key_id TEXT PRIMARY KEY, tenant TEXT NOT NULL, scopes TEXT NOT NULL, mac BLOB NOT NULL,
    created INTEGER NOT NULL, expires INTEGER, revoked INTEGER
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS grants (
    adapter TEXT NOT NULL, tenant TEXT NOT NULL, PRIMARY KEY (adapter, tenant)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO facts VALUES ('version', 0);
"""
_BUSY_TIMEOUT_S = 5.0


class SqliteKeyStore:
    """A `KeyStore` in one file. Reads and writes have a connection each, so no request waits for a writer's sync."""

    def __init__(self, path: Path, pepper: bytes) -> None:
        """Open or create the file.

        Raises:
            StartError: its keys were made with another pepper. Unavailable: the file cannot be used.
        """
        self._writing, self._reading = threading.Lock(), threading.Lock()
        with _storage_errors():
            _create_private(path)
            self._writer = connect(path, busy_timeout_s=_BUSY_TIMEOUT_S)
        try:
            with _storage_errors():
                self._writer.executescript(_SCHEMA)
            self._check_pepper(pepper)
            with _storage_errors():
                self._reader = connect(path, busy_timeout_s=_BUSY_TIMEOUT_S)
        except BaseException:
            self._writer.close()
            raise

    def version(self) -> int:
        """Return a number that every change raises."""
        with self._reading, _storage_errors():
            return _version(self._reader)

    def snapshot(self) -> KeySnapshot:
        """Return all keys and grants, and the version they are of, read at once."""
        with self._reading, _storage_errors():
            self._reader.execute("BEGIN")
            try:
                rows = self._reader.execute("SELECT * FROM keys ORDER BY created, key_id").fetchall()
                grants = self._reader.execute("SELECT adapter, tenant FROM grants ORDER BY adapter, tenant").fetchall()
                records = tuple(map(_record, rows))
                return KeySnapshot(_version(self._reader), records, tuple(Grant(*row) for row in grants))
            finally:
                self._reader.execute("COMMIT")

    def add(self, record: KeyRecord) -> None:
        """Keep a new key."""
        with self._change() as db:
            _insert(db, record)

    def revoke(self, key_id: str, *, now: int) -> KeyRecord:
        """Make a key invalid for ever; revoking twice keeps the first time. Raises KeyNotFound."""
        with self._change() as db:
            record = _find(db, key_id)
            if record.revoked is None:
                record = replace(record, revoked=now)
                db.execute("UPDATE keys SET revoked = ? WHERE key_id = ?", (now, key_id))
            return record

    def rotate(self, key_id: str, successor: KeyRecord, *, until: int) -> KeyRecord:
        """Keep `successor` and let the old key end at `until` at the latest, both or neither. Raises KeyNotFound."""
        with self._change() as db:
            record = ends_by(_find(db, key_id), until)
            db.execute("UPDATE keys SET expires = ? WHERE key_id = ?", (record.expires, key_id))
            _insert(db, successor)
            return record

    def grant(self, grant: Grant) -> None:
        """Let a tenant use an adapter; twice is once."""
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO grants VALUES (?, ?)", (grant.adapter, grant.tenant))

    def withdraw(self, adapter: str, tenant: str | None) -> int:
        """Take back one tenant's grant, or all of an adapter's; return how many there were."""
        with self._change() as db:
            query = "DELETE FROM grants WHERE adapter = ? AND tenant = coalesce(?, tenant)"
            return db.execute(query, (adapter, tenant)).rowcount

    def close(self) -> None:
        """Give back the connections."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()

    def _check_pepper(self, pepper: bytes) -> None:
        mark = pepper_mark(pepper)
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO facts VALUES ('pepper', ?)", (mark,))
            (kept,) = db.execute("SELECT value FROM facts WHERE name = 'pepper'").fetchone()
        check_mark(mark, kept)

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._transaction() as db:
            yield db
            db.execute("UPDATE facts SET value = value + 1 WHERE name = 'version'")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, _storage_errors(), transaction(self._writer) as db:
            yield db


def _create_private(path: Path) -> None:
    """Make the file before SQLite does, so that nobody else can ever read it."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT value FROM facts WHERE name = 'version'").fetchone()[0])


def _insert(db: sqlite3.Connection, record: KeyRecord) -> None:
    scopes = " ".join(sorted(record.scopes))
    values = (record.key_id, record.tenant, scopes, record.mac, record.created, record.expires, record.revoked)
    db.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _find(db: sqlite3.Connection, key_id: str) -> KeyRecord:
    row = db.execute("SELECT * FROM keys WHERE key_id = ?", (key_id,)).fetchone()
    if row is None:
        raise unknown_key(key_id)
    return _record(row)


def _record(row: tuple[str, str, str, bytes, int, int | None, int | None]) -> KeyRecord:
    key_id, tenant, scopes, mac, created, expires, revoked = row
    return KeyRecord(key_id, tenant, frozenset(map(Scope, scopes.split())), mac, created, expires, revoked)


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        raise Unavailable(
            "the store of API keys cannot be read or written; try again later", code="key_store_unavailable"
        ) from error

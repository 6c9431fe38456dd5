"""The embedded registry: one SQLite file, write-ahead log, synchronous=FULL.

Owns the tables and their transactions, nothing on disk besides its file. Invariant: every change is one transaction
that is durable before the call returns, so what was acknowledged survives a kill and a power loss.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from adapters_store.durable_sqlite import connect, snapshot, transaction
from adapters_store.errors import AdapterNotFound, NameTaken, StorageFailed, StoreFull
from adapters_store.manifest import Report
from adapters_store.pointers import CANARY, Choose, Decide, Named, Pointers, pointers_before_moves, read_pointers
from adapters_store.registry import AdapterVersion, Check, NewVersion, Traffic, move_of, take_all
from adapters_store.registry_changes import Everything

_SCHEMA = """
CREATE TABLE IF NOT EXISTS names (
    name TEXT PRIMARY KEY, folded TEXT NOT NULL UNIQUE, current INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, facts TEXT NOT NULL,
    PRIMARY KEY (name, version)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS versions_by_digest ON versions (digest);
CREATE TABLE IF NOT EXISTS aliases (
    name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (name, alias)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pointers (name TEXT PRIMARY KEY, share INTEGER NOT NULL, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS numbers (folded TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS retired (digest TEXT PRIMARY KEY, since INTEGER NOT NULL) WITHOUT ROWID;
"""
# another process holds the write lock for one small transaction at most
_BUSY_TIMEOUT_S = 30.0
_CURRENT = "JOIN names n ON n.name = v.name AND n.current = v.version WHERE v.name = ?"
_CANARY = """SELECT a.version FROM pointers p JOIN aliases a ON a.name = p.name
    WHERE p.name = ? AND p.share > 0 AND a.alias = ?"""
_ONE = "WHERE v.name = ? AND v.version = ?"


class SqliteRegistry:
    """A `Registry` in one file. Reads and writes have a connection each, so no request waits for an upload's sync."""

    def __init__(self, path: Path) -> None:
        self._writing, self._reading = threading.Lock(), threading.Lock()
        with _storage_errors():
            self._writer = connect(path, busy_timeout_s=_BUSY_TIMEOUT_S)
            try:
                self._writer.executescript(_SCHEMA)
                self._reader = connect(path, busy_timeout_s=_BUSY_TIMEOUT_S)
            except sqlite3.Error:
                self._writer.close()
                raise

    def publish(self, new: NewVersion, *, check: Check = take_all) -> AdapterVersion:
        """Give the next number, make it the name's current version, return when durable."""
        # its caller holds the store's lock, so nothing comes between
        check(self)
        folded = new.name.casefold()
        with self._transaction() as db:
            self._check_free(db, new.name)
            row = db.execute("SELECT last FROM numbers WHERE folded = ?", (folded,)).fetchone()
            number = (row[0] if row else 0) + 1
            pointers = read_pointers_of(db, new.name) or Pointers()
            facts = asdict(new)
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", (new.name, number, new.digest, json.dumps(facts)))
            db.execute("INSERT OR REPLACE INTO numbers VALUES (?, ?)", (folded, number))
            version = _version(number, json.dumps(facts))
            _write_pointers(db, new.name, pointers.after(move_of(version)))
        return version

    def check_free(self, name: str) -> None:
        """Raise NameTaken if `name` differs only in case from another, or spells an existing `name:alias`."""
        with self._read() as db:
            self._check_free(db, name)

    def current(self, name: str) -> AdapterVersion | None:
        """Return the name's current version."""
        return self._one(_CURRENT, name)

    def version(self, name: str, version: int) -> AdapterVersion | None:
        """Return one version by number."""
        return self._one(_ONE, name, version)

    def aliased(self, name: str, alias: str) -> AdapterVersion | None:
        """Return the version that `name:alias` points to."""
        join = "JOIN aliases a ON a.name = v.name AND a.version = v.version WHERE a.name = ? AND a.alias = ?"
        return self._one(join, name, alias)

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return all versions of a name, oldest first."""
        return self._many("WHERE v.name = ? ORDER BY v.version", name)

    def all_current(self) -> list[AdapterVersion]:
        """Return the current version of every name, by name."""
        return self._many("JOIN names n ON n.name = v.name AND n.current = v.version ORDER BY v.name")

    def pointers(self, name: str) -> Pointers | None:
        """Return where a name points and how it came to that."""
        with self._read() as db, snapshot(db):
            return read_pointers_of(db, name)

    def canary(self, name: str) -> int | None:
        """Return the version that gets a share of the plain name's requests."""
        with self._read() as db:
            row = db.execute(_CANARY, (name, CANARY)).fetchone()
        return None if row is None else int(row[0])

    def traffic(self, name: str) -> Traffic | None:
        """Return what the plain name means, canary included, as of one moment."""
        with self._read() as db, snapshot(db):
            current = _select(db, _CURRENT, name)
            # the usual case has no canary and asks nothing more
            row = db.execute(_CANARY, (name, CANARY)).fetchone()
            canary = [] if row is None else _select(db, _ONE, name, row[0])
            pointers = None if row is None else read_pointers_of(db, name)
        if not current:
            return None
        return Traffic(current[0], canary[0] if canary else None, pointers or Pointers())

    def move(self, name: str, decide: Decide) -> Pointers:
        """Let `decide` see the name with nothing else moving, make its move, return the pointers when durable."""
        with self._transaction() as db:
            named = _named(db, name)
            move = decide(named)
            if move is None:
                return named.pointers
            pointers = named.pointers.after(move)
            _write_pointers(db, name, pointers)
        return pointers

    def retire(self, name: str, choose: Choose, *, now: int) -> list[AdapterVersion]:
        """Forget the versions that `choose` names and return them; their digests count as retired from `now` on."""
        with self._transaction() as db:
            named = _named(db, name)
            gone = [version for number in choose(named) for version in _select(db, _ONE, name, number)]
            for version in gone:
                db.execute("DELETE FROM versions WHERE name = ? AND version = ?", (name, version.version))
                db.execute("INSERT OR REPLACE INTO retired VALUES (?, ?)", (version.digest, now))
            if gone:
                _write_pointers(db, name, named.pointers.without(version.version for version in gone))
        return gone

    def delete(self, name: str, *, now: int) -> None:
        """Forget a name with its versions and aliases; their digests count as retired from `now` on."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO retired SELECT digest, ? FROM versions WHERE name = ?", (now, name))
            for table in ("names", "versions", "aliases", "pointers"):
                db.execute(f"DELETE FROM {table} WHERE name = ?", (name,))

    def digests(self, *, retired_since: int) -> set[str]:
        """Return every digest that some version points to, or that was retired at or after that time."""
        query = "SELECT digest FROM versions UNION SELECT digest FROM retired WHERE since >= ?"
        with self._transaction() as db:
            db.execute("DELETE FROM retired WHERE since < ?", (retired_since,))
            return {row[0] for row in db.execute(query, (retired_since,))}

    def everything(self) -> Everything:
        """Return all that the file holds, as one change of a journal."""
        with self._transaction() as db:
            versions = db.execute("SELECT version, facts FROM versions ORDER BY name, version").fetchall()
            names = db.execute("SELECT name FROM names").fetchall()
            return Everything(
                store_id="",
                versions=tuple(_version(number, facts) for number, facts in versions),
                pointers={name: read_pointers_of(db, name) or Pointers() for (name,) in names},
                last_numbers=dict(db.execute("SELECT folded, last FROM numbers")),
                retired=dict(db.execute("SELECT digest, since FROM retired")),
            )

    def adopt(self, everything: Everything) -> None:
        """Hold this and nothing else; returns when it is durable."""
        with self._transaction() as db:
            for table in ("names", "versions", "aliases", "pointers", "numbers", "retired"):
                db.execute(f"DELETE FROM {table}")
            for version in everything.versions:
                facts = asdict(version)
                number, name = facts.pop("version"), version.name
                db.execute(
                    "INSERT INTO versions VALUES (?, ?, ?, ?)", (name, number, version.digest, json.dumps(facts))
                )
            for name, pointers in everything.pointers.items():
                _write_pointers(db, name, pointers)
            db.executemany("INSERT INTO numbers VALUES (?, ?)", everything.last_numbers.items())
            db.executemany("INSERT INTO retired VALUES (?, ?)", everything.retired.items())

    def close(self) -> None:
        """Give back the connections."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()

    @staticmethod
    def _check_free(db: sqlite3.Connection, name: str) -> None:
        row = db.execute("SELECT name FROM names WHERE folded = ?", (name.casefold(),)).fetchone()
        if row is not None and row[0] != name:
            raise NameTaken(
                f"adapter '{name}' differs only in case from the existing '{row[0]}'; choose another name", param="name"
            )
        owner, _, alias = name.rpartition(":")
        if owner and db.execute("SELECT 1 FROM aliases WHERE name = ? AND alias = ?", (owner, alias)).fetchone():
            raise NameTaken(f"'{name}' is the alias '{alias}' of adapter '{owner}'; choose another name", param="name")

    def _one(self, clause: str, *values: str | int) -> AdapterVersion | None:
        found = self._many(clause, *values)
        return found[0] if found else None

    def _many(self, clause: str, *values: str | int) -> list[AdapterVersion]:
        with self._read() as db:
            return _select(db, clause, *values)

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._reading, _storage_errors():
            yield self._reader

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._writing, _storage_errors(), transaction(self._writer) as db:
            yield db


def read_pointers_of(db: sqlite3.Connection, name: str) -> Pointers | None:
    """Return a name's pointers, those that a release without moves left included."""
    row = db.execute("SELECT current FROM names WHERE name = ?", (name,)).fetchone()
    if row is None:
        return None
    aliases = dict(db.execute("SELECT alias, version FROM aliases WHERE name = ?", (name,)))
    facts = db.execute("SELECT facts FROM pointers WHERE name = ?", (name,)).fetchone()
    if facts is not None:
        return read_pointers(json.loads(facts[0]), aliases)
    return pointers_before_moves(row[0], _numbers(db, name), aliases)


def _write_pointers(db: sqlite3.Connection, name: str, pointers: Pointers) -> None:
    db.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?)", (name, name.casefold(), pointers.current))
    db.execute("DELETE FROM aliases WHERE name = ?", (name,))
    aliases = [(name, alias, number) for alias, number in pointers.aliases.items()]
    db.executemany("INSERT INTO aliases VALUES (?, ?, ?)", aliases)
    facts = json.dumps(pointers.to_json())
    db.execute("INSERT OR REPLACE INTO pointers VALUES (?, ?, ?)", (name, pointers.share, facts))


def _named(db: sqlite3.Connection, name: str) -> Named:
    pointers = read_pointers_of(db, name)
    if pointers is None:
        raise AdapterNotFound(f"there is no adapter {ascii(name)[:140]}; GET /v1/adapters lists them", param="name")

    def is_name(other: str) -> bool:
        return db.execute("SELECT 1 FROM names WHERE name = ?", (other,)).fetchone() is not None

    return Named(name, pointers, _numbers(db, name), is_name)


def _numbers(db: sqlite3.Connection, name: str) -> tuple[int, ...]:
    return tuple(row[0] for row in db.execute("SELECT version FROM versions WHERE name = ? ORDER BY version", (name,)))


def _select(db: sqlite3.Connection, clause: str, *values: str | int) -> list[AdapterVersion]:
    rows = db.execute(f"SELECT v.version, v.facts FROM versions v {clause}", values).fetchall()
    return [_version(number, facts) for number, facts in rows]


def _version(number: int, facts: str) -> AdapterVersion:
    values = json.loads(facts)
    report = {key: tuple(items) for key, items in values.pop("report").items()}
    tokens = tuple(values.pop("invocation_tokens", ()))
    # fields that a version's registry did not know yet take their defaults
    return AdapterVersion(version=number, report=Report(**report), invocation_tokens=tokens, **values)


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "") == "SQLITE_FULL":
            raise StoreFull("the adapter store's disk is full; delete adapters or ask the operator") from error
        raise StorageFailed("the adapter store's registry cannot be read or written; try again later") from error

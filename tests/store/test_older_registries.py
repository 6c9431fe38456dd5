"""Registries that a release without pointers wrote: read as they were meant, and steered from there."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest

from adapters_store.journal import NOTHING_BEFORE, Journal, LinkingFileSystem
from adapters_store.registry import Registry
from adapters_store.registry_changes import Entry, Founded, write_entry
from adapters_store.registry_redis import JOURNAL
from adapters_store.registry_sqlite import SqliteRegistry
from adapters_store.steering import Actor, canaried, rolled_back
from adapters_store.strict_json import canonical_json
from tests.store.registry_cases import new, open_alone

_TABLES = """
CREATE TABLE names (name TEXT PRIMARY KEY, folded TEXT NOT NULL UNIQUE, current INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, facts TEXT NOT NULL,
    PRIMARY KEY (name, version)) WITHOUT ROWID;
CREATE TABLE aliases (name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (name, alias)) WITHOUT ROWID;
CREATE TABLE numbers (folded TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE retired (digest TEXT PRIMARY KEY, since INTEGER NOT NULL) WITHOUT ROWID;
"""
# what an older release did not know
_NEWER = ("by", "staged", "signature", "provenance")


def facts(digest: str) -> dict[str, object]:
    return {key: value for key, value in asdict(new(digest=digest)).items() if key not in _NEWER}


def old_sqlite(folder: Path) -> Registry:
    """Return a file with `fr` in three versions, the newest current, and an alias."""
    path = folder / "registry.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(_TABLES)
        for number, digest in enumerate("abc", start=1):
            db.execute("INSERT INTO versions VALUES ('fr', ?, ?, ?)", (number, digest * 64, json.dumps(facts(digest))))
        db.execute("INSERT INTO names VALUES ('fr', 'fr', 3)")
        db.execute("INSERT INTO numbers VALUES ('fr', 3)")
        db.execute("INSERT INTO aliases VALUES ('fr', 'prod', 1)")
    return SqliteRegistry(path)


class OldJournal:
    """Writes entries as the older release did."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder / JOURNAL, LinkingFileSystem())
        self.number, self.before = 0, NOTHING_BEFORE
        self.write(write_entry(Entry(0, NOTHING_BEFORE, Founded("store"))))

    def add(self, **body: object) -> None:
        fields = {"number": self.number, "before": self.before, **body}
        self.write(canonical_json(fields))  # type: ignore[arg-type]

    def write(self, payload: bytes) -> None:
        assert self.journal.append(self.number, payload)
        self.number, self.before = self.number + 1, hashlib.sha256(payload).hexdigest()


def old_journal(folder: Path) -> Registry:
    """Return the same as one entry per change."""
    old = OldJournal(folder)
    for number, digest in enumerate("abc", start=1):
        old.add(kind="published", version=facts(digest) | {"version": number})
    old.add(kind="aliased", name="fr", alias="prod", version=1)
    return open_alone(folder)


def old_checkpoint(folder: Path) -> Registry:
    """Return the same as one entry that holds everything."""
    old = OldJournal(folder)
    old.add(
        kind="everything",
        store="store",
        versions=[facts(digest) | {"version": number} for number, digest in enumerate("abc", start=1)],
        current={"fr": 3},
        aliases=[["fr", "prod", 1]],
        last_numbers={"fr": 3},
        retired={},
    )
    return open_alone(folder)


@pytest.mark.parametrize("write", [old_sqlite, old_journal, old_checkpoint])
def test_what_an_older_release_wrote_is_read_and_steered_from_there(
    tmp_path: Path, write: Callable[[Path], Registry]
) -> None:
    registry = write(tmp_path)
    pointers = registry.pointers("fr")
    assert pointers is not None and pointers.trail == (1, 2, 3) and dict(pointers.aliases) == {"prod": 1}
    current = registry.current("fr")
    assert current is not None and (current.version, current.by, current.staged) == (3, "", False)
    actor = Actor("t", 5)
    registry.move("fr", canaried(actor, 1, 25.0, pointers.sticky))
    registry.move("fr", rolled_back(actor))
    assert registry.publish(new(digest="d")).version == 4
    moved = registry.pointers("fr")
    assert moved is not None and moved.trail == (1, 2, 4) and (moved.canary, moved.share) == (1, 2500)
    registry.close()
    again = open_alone(tmp_path) if (tmp_path / JOURNAL).exists() else SqliteRegistry(tmp_path / "registry.sqlite")
    assert again.pointers("fr") == moved
    again.close()

"""What one entry of the shared journal of training jobs says, and its form: how rows of the tables read from here on.

Owns the reading and writing of payloads, and how rows are taken from tables and put into them. Invariants: an entry
holds values only, never a statement; reading what was written gives equal changes, and a payload of another form, or of
a table or column that is not known here, is an error that says so.
"""

import json
import sqlite3
from dataclasses import dataclass

from adapters_store.errors import StorageFailed
from adapters_store.json_values import flag, integer, json_list, json_object, text
from adapters_store.strict_json import Json, canonical_json

TABLES = ("jobs", "events", "checkpoints", "files", "turns")
# each change of a table leaves its rows' numbers here, until `forget_changes`
_WATCH = """
CREATE TEMP TABLE changed (name TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, number));
{triggers}
"""
_TRIGGER = """
CREATE TEMP TRIGGER {name}_{verb} AFTER {verb} ON main.{name}
BEGIN INSERT OR IGNORE INTO changed VALUES ('{name}', {row}.number); END;
"""

Cell = None | int | float | str
Row = tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class RowChanges:
    """Rows by table and number, as tuples of all columns but the number; None: gone.

    With `is_everything` there are no other rows.
    """

    rows: dict[str, dict[int, Row | None]]
    is_everything: bool = False

    @property
    def num_rows(self) -> int:
        """Return how many rows these are."""
        return sum(map(len, self.rows.values()))


@dataclass(frozen=True, slots=True)
class RowEntry:
    """Changes in their place: `before` is the SHA-256 of the payload of the entry before it."""

    number: int
    before: str
    changes: RowChanges

    @property
    def is_everything(self) -> bool:
        """Return whether readers may begin here."""
        return self.changes.is_everything


def watch_changes(db: sqlite3.Connection) -> None:
    """Let a connection note from now on which rows it changes."""
    verbs = (("INSERT", "NEW"), ("UPDATE", "NEW"), ("DELETE", "OLD"))
    triggers = (_TRIGGER.format(name=name, verb=verb, row=row) for name in TABLES for verb, row in verbs)
    db.executescript(_WATCH.format(triggers="".join(triggers)))


def forget_changes(db: sqlite3.Connection) -> None:
    """Begin anew with noting."""
    db.execute("DELETE FROM changed")


def noted_changes(db: sqlite3.Connection) -> RowChanges:
    """Return how the rows that were changed since `forget_changes` read now."""
    rows: dict[str, dict[int, Row | None]] = {}
    for name, number in db.execute("SELECT name, number FROM changed ORDER BY name, number").fetchall():
        found = db.execute(f"SELECT {_columns_text(db, name)} FROM {name} WHERE number = ?", (number,)).fetchone()
        rows.setdefault(name, {})[number] = None if found is None else tuple(found)
    return RowChanges(rows)


def all_rows(db: sqlite3.Connection) -> RowChanges:
    """Return every row there is."""
    rows: dict[str, dict[int, Row | None]] = {}
    for name in TABLES:
        query = f"SELECT number, {_columns_text(db, name)} FROM {name} ORDER BY number"
        rows[name] = {row[0]: tuple(row[1:]) for row in db.execute(query).fetchall()}
    return RowChanges(rows, is_everything=True)


def count_rows(db: sqlite3.Connection) -> int:
    """Return how many rows all tables have together."""
    return sum(db.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in TABLES)


def apply(db: sqlite3.Connection, changes: RowChanges) -> None:
    """Make rows read as an entry says; raises sqlite3.Error."""
    if changes.is_everything:
        for name in TABLES:
            db.execute(f"DELETE FROM {name}")
    for name, rows in changes.rows.items():
        gone = [(number,) for number, row in rows.items() if row is None]
        db.executemany(f"DELETE FROM {name} WHERE number = ?", gone)
        marks = ",".join("?" * (1 + len(columns(db, name))))
        given = [(number, *row) for number, row in rows.items() if row is not None]
        db.executemany(f"INSERT OR REPLACE INTO {name} (number, {_columns_text(db, name)}) VALUES ({marks})", given)


def write_entry(entry: RowEntry, db: sqlite3.Connection) -> bytes:
    """Return an entry's payload; the tables say which columns their rows have."""
    tables: dict[str, Json] = {}
    # servers that do not know a table can read a journal that never had a row of it
    for name, rows in ((name, rows) for name, rows in entry.changes.rows.items() if rows):
        numbered: list[Json] = [[number, None if row is None else [*row]] for number, row in rows.items()]
        tables[name] = {"columns": [*columns(db, name)], "rows": numbered}
    everything = entry.changes.is_everything
    return canonical_json({"number": entry.number, "before": entry.before, "everything": everything, "tables": tables})


def read_entry(payload: bytes, number: int, db: sqlite3.Connection) -> RowEntry:
    """Read the payload of entry `number`.

    Raises:
        StorageFailed: it is of another place, or written by a newer release.
    """
    try:
        facts = json_object(json.loads(payload))
        if integer(facts.pop("number")) != number:
            raise ValueError("an entry of another place")
        before, everything = text(facts.pop("before")), flag(facts.pop("everything"))
        tables = json_object(facts.pop("tables"))
        rows = {name: _rows(db, name, json_object(tables[name])) for name in TABLES if name in tables}
        if facts or tables.keys() - set(TABLES):
            raise ValueError("unknown fields")
        return RowEntry(number, before, RowChanges(rows, everything))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageFailed(
            f"change {number} of the store's training jobs is of an unknown form; update this server, or restore it"
        ) from error


def columns(db: sqlite3.Connection, name: str) -> tuple[str, ...]:
    """Return the columns of a table, the number left out."""
    found = (row[1] for row in db.execute(f"PRAGMA main.table_info({name})").fetchall())
    return tuple(column for column in found if column != "number")


def _columns_text(db: sqlite3.Connection, name: str) -> str:
    return ", ".join(columns(db, name))


def _rows(db: sqlite3.Connection, name: str, table: dict[str, Json]) -> dict[int, Row | None]:
    if json_list(table["columns"]) != [*columns(db, name)]:
        raise ValueError("other columns")
    return {integer(number): _row(row) for number, row in map(_pair, json_list(table["rows"]))}


def _pair(value: Json) -> tuple[Json, Json]:
    number, row = json_list(value)
    return number, row


def _row(value: Json) -> Row | None:
    if value is None:
        return None
    return tuple(_cell(cell) for cell in json_list(value))


def _cell(value: Json) -> Cell:
    if isinstance(value, list | dict | bool):
        raise TypeError("a cell is null, a number or text")
    return value

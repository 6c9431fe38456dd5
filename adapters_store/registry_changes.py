"""What may happen to the names of a store, as values, and their form in the journal.

Owns the reading and writing of journal payloads; decides nothing. Invariant: reading what was written gives an equal
change, and a payload of another form is an error that says so, never a guess.
"""

import json
from dataclasses import asdict, dataclass, field

from adapters_store.errors import StorageFailed
from adapters_store.manifest import Report
from adapters_store.registry import AdapterVersion
from adapters_store.strict_json import Json, canonical_json


@dataclass(frozen=True, slots=True)
class Founded:
    """The store's beginning: entry 0, with an identity that no other store has."""

    store_id: str


@dataclass(frozen=True, slots=True)
class Published:
    """A version, which became its name's current one."""

    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class Aliased:
    """`name:alias` points to a version from here on."""

    name: str
    alias: str
    version: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """A name went with its versions and aliases at `now` (unix seconds)."""

    name: str
    now: int


@dataclass(frozen=True, slots=True)
class Everything:
    """All that the changes before came to: readers may begin here."""

    store_id: str
    versions: tuple[AdapterVersion, ...] = ()
    # name -> its current version, (name, alias) -> version, folded name -> last number given, digest -> retired when
    current: dict[str, int] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    last_numbers: dict[str, int] = field(default_factory=dict)
    retired: dict[str, int] = field(default_factory=dict)


Change = Founded | Published | Aliased | Deleted | Everything


@dataclass(frozen=True, slots=True)
class Entry:
    """A change in its place: `before` is the SHA-256 of the payload of the entry before it."""

    number: int
    before: str
    change: Change


def write_entry(entry: Entry) -> bytes:
    """Return an entry's payload."""
    body = _body(entry.change)
    return canonical_json({"number": entry.number, "before": entry.before, **body})


def read_entry(payload: bytes, number: int) -> Entry:
    """Read the payload of entry `number`.

    Raises:
        StorageFailed: it is of another place, or written by a newer release.
    """
    try:
        fields = json.loads(payload)
        if fields["number"] != number:
            raise ValueError("an entry of another place")
        return Entry(number, str(fields["before"]), _change(fields))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageFailed(
            f"change {number} of the store's journal is of an unknown form; update this server, or restore the file"
        ) from error


def version_of(facts: dict[str, Json]) -> AdapterVersion:
    """Return the version that `asdict` gave these facts; what an older release did not write takes its default."""
    values = dict(facts)
    report = {key: tuple(items) for key, items in values.pop("report").items()}  # type: ignore[union-attr,arg-type]
    tokens = tuple(values.pop("invocation_tokens", ()))  # type: ignore[arg-type]
    return AdapterVersion(report=Report(**report), invocation_tokens=tokens, **values)  # type: ignore[arg-type]


def _body(change: Change) -> dict[str, Json]:
    match change:
        case Founded(store_id):
            return {"kind": "founded", "store": store_id}
        case Published(version):
            return {"kind": "published", "version": asdict(version)}
        case Aliased(name, alias, number):
            return {"kind": "aliased", "name": name, "alias": alias, "version": number}
        case Deleted(name, now):
            return {"kind": "deleted", "name": name, "now": now}
        case Everything():
            return {
                "kind": "everything",
                "store": change.store_id,
                "versions": [asdict(version) for version in change.versions],
                "current": {**change.current},
                "aliases": [[name, alias, number] for (name, alias), number in sorted(change.aliases.items())],
                "last_numbers": {**change.last_numbers},
                "retired": {**change.retired},
            }


def _change(fields: dict[str, Json]) -> Change:
    values = {key: value for key, value in fields.items() if key not in ("number", "before", "kind")}
    match fields["kind"]:
        case "founded":
            return Founded(str(values["store"]))
        case "published":
            return Published(version_of(values["version"]))  # type: ignore[arg-type]
        case "aliased":
            return Aliased(**values)  # type: ignore[arg-type]
        case "deleted":
            return Deleted(**values)  # type: ignore[arg-type]
        case "everything":
            return Everything(
                store_id=str(values["store"]),
                versions=tuple(version_of(facts) for facts in values["versions"]),  # type: ignore[union-attr,arg-type]
                current=values["current"],  # type: ignore[arg-type]
                aliases=_aliases(values["aliases"]),
                last_numbers=values["last_numbers"],  # type: ignore[arg-type]
                retired=values["retired"],  # type: ignore[arg-type]
            )
        case kind:
            raise ValueError(f"unknown kind {kind!r}")


def _aliases(rows: Json) -> dict[tuple[str, str], int]:
    if not isinstance(rows, list):
        raise ValueError("aliases are no list")
    return {(row[0], row[1]): row[2] for row in rows}  # type: ignore[misc,index]

"""What may happen to the names of a store, as values, and their form in the journal.

Owns the reading and writing of journal payloads; decides nothing. Invariant: reading what was written gives an equal
change, and a payload of another form is an error that says so, never a guess.
"""

import json
from dataclasses import asdict, dataclass, field

from adapters_store.errors import StorageFailed
from adapters_store.json_values import integer, json_list, json_object, text
from adapters_store.manifest import Report
from adapters_store.pointers import (
    Move,
    Pointers,
    What,
    move_json,
    pointers_before_moves,
    read_move,
    read_pointers,
)
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
class Moved:
    """A pointer of a name moved."""

    name: str
    move: Move


@dataclass(frozen=True, slots=True)
class Retired:
    """Versions of a name went at `now` (unix seconds); the name stays."""

    name: str
    versions: tuple[int, ...]
    now: int


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
    # by name; folded name -> last number given, digest -> retired when
    pointers: dict[str, Pointers] = field(default_factory=dict)
    last_numbers: dict[str, int] = field(default_factory=dict)
    retired: dict[str, int] = field(default_factory=dict)


Change = Founded | Published | Moved | Retired | Deleted | Everything


@dataclass(frozen=True, slots=True)
class Entry:
    """A change in its place: `before` is the SHA-256 of the payload of the entry before it."""

    number: int
    before: str
    change: Change

    @property
    def is_everything(self) -> bool:
        """Return whether readers may begin here."""
        return isinstance(self.change, Everything)


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
        case Moved(name, move):
            return {"kind": "moved", "name": name, "move": move_json(move)}
        case Retired(name, numbers, now):
            return {"kind": "retired", "name": name, "versions": [*numbers], "now": now}
        case Deleted(name, now):
            return {"kind": "deleted", "name": name, "now": now}
        case Everything():
            return {
                "kind": "everything",
                "store": change.store_id,
                "versions": [asdict(version) for version in change.versions],
                "current": {name: each.current for name, each in change.pointers.items()},
                "aliases": [
                    [name, alias, number]
                    for name, each in sorted(change.pointers.items())
                    for alias, number in sorted(each.aliases.items())
                ],
                "pointers": {name: each.to_json() for name, each in change.pointers.items()},
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
        case "moved":
            return Moved(str(values["name"]), read_move(values["move"]))
        case "aliased":
            # as releases before the moves wrote it
            move = Move(What.ALIAS, int(values["version"]), 0, "", alias=str(values["alias"]))  # type: ignore[arg-type]
            return Moved(str(values["name"]), move)
        case "retired":
            return Retired(str(values["name"]), tuple(values["versions"]), int(values["now"]))  # type: ignore[arg-type]
        case "deleted":
            return Deleted(**values)  # type: ignore[arg-type]
        case "everything":
            versions = tuple(version_of(facts) for facts in values["versions"])  # type: ignore[union-attr,arg-type]
            return Everything(
                store_id=str(values["store"]),
                versions=versions,
                pointers=_pointers(values, versions),
                last_numbers=values["last_numbers"],  # type: ignore[arg-type]
                retired=values["retired"],  # type: ignore[arg-type]
            )
        case kind:
            raise ValueError(f"unknown kind {kind!r}")


def _pointers(values: dict[str, Json], versions: tuple[AdapterVersion, ...]) -> dict[str, Pointers]:
    aliases: dict[str, dict[str, int]] = {}
    for row in map(json_list, json_list(values["aliases"])):
        aliases.setdefault(text(row[0]), {})[text(row[1])] = integer(row[2])
    known = json_object(values.get("pointers", {}))
    found = {}
    for name, current in json_object(values["current"]).items():
        if name in known:
            found[name] = read_pointers(known[name], aliases.get(name, {}))
        else:
            numbers = [version.version for version in versions if version.name == name]
            found[name] = pointers_before_moves(integer(current), numbers, aliases.get(name, {}))
    return found

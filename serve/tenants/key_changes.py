"""What one entry of the shared key journal says, and its form.

Owns the reading and writing of payloads; decides nothing. Invariant: reading what was written gives an equal change,
and a payload of another form is an error that says so, never a guess.
"""

import json
from dataclasses import dataclass

from adapters_store.errors import StorageFailed
from adapters_store.json_values import flag, integer, json_list, json_object, text
from adapters_store.strict_json import Json, canonical_json
from serve.tenants.key_store import Grant
from serve.tenants.keys import KeyRecord
from serve.tenants.principal import Scope


@dataclass(frozen=True, slots=True)
class KeyChange:
    """How some keys read from here on, and which grants came and went; `pepper_mark` is the first entry's.

    With `is_everything` there are no other keys and grants.
    """

    records: tuple[KeyRecord, ...] = ()
    granted: tuple[Grant, ...] = ()
    withdrawn: tuple[Grant, ...] = ()
    pepper_mark: str = ""
    is_everything: bool = False


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A change in its place: `before` is the SHA-256 of the payload of the entry before it."""

    number: int
    before: str
    change: KeyChange

    @property
    def is_everything(self) -> bool:
        """Return whether readers may begin here."""
        return self.change.is_everything


def write_entry(entry: KeyEntry) -> bytes:
    """Return an entry's payload."""
    change = entry.change
    # servers that never fold can read a journal that was never folded
    everything: dict[str, Json] = {"everything": True} if change.is_everything else {}
    return canonical_json(
        everything
        | {
            "number": entry.number,
            "before": entry.before,
            "pepper_mark": change.pepper_mark,
            "keys": [_key_facts(record) for record in change.records],
            "granted": [[grant.adapter, grant.tenant] for grant in change.granted],
            "withdrawn": [[grant.adapter, grant.tenant] for grant in change.withdrawn],
        }
    )


def read_entry(payload: bytes, number: int) -> KeyEntry:
    """Read the payload of entry `number`.

    Raises:
        StorageFailed: it is of another place, or written by a newer release.
    """
    try:
        facts = json_object(json.loads(payload))
        if integer(facts.pop("number")) != number:
            raise ValueError("an entry of another place")
        before = text(facts.pop("before"))
        change = KeyChange(
            records=tuple(_record(json_object(each)) for each in json_list(facts.pop("keys"))),
            granted=_grants(facts.pop("granted")),
            withdrawn=_grants(facts.pop("withdrawn")),
            pepper_mark=text(facts.pop("pepper_mark")),
            is_everything=flag(facts.pop("everything", False)),
        )
        if facts:
            raise ValueError("unknown fields")
        return KeyEntry(number, before, change)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageFailed(
            f"change {number} of the store's keys is of an unknown form; update this server, or restore the file"
        ) from error


def _key_facts(record: KeyRecord) -> dict[str, Json]:
    return {
        "id": record.key_id,
        "tenant": record.tenant,
        "scopes": [*sorted(record.scopes)],
        "mac": record.mac.hex(),
        "created": record.created,
        "expires": record.expires,
        "revoked": record.revoked,
    }


def _record(facts: dict[str, Json]) -> KeyRecord:
    return KeyRecord(
        key_id=text(facts["id"]),
        tenant=text(facts["tenant"]),
        scopes=frozenset(Scope(text(name)) for name in json_list(facts["scopes"])),
        mac=bytes.fromhex(text(facts["mac"])),
        created=integer(facts["created"]),
        expires=_time(facts["expires"]),
        revoked=_time(facts["revoked"]),
    )


def _time(value: Json) -> int | None:
    return None if value is None else integer(value)


def _grants(rows: Json) -> tuple[Grant, ...]:
    pairs = [json_list(row) for row in json_list(rows)]
    return tuple(Grant(text(adapter), text(tenant)) for adapter, tenant in pairs)

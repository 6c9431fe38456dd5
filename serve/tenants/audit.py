"""The audit log: what was done to keys and adapters, by whom; one JSON object per line, each bound to the one before.

Owns one append-only file. A record's `digest` is the SHA-256 of its own other fields, of which `previous` is the digest
of the record before it: altering, removing, inserting or reordering one breaks the chain there. What no chain can show
is that its end was cut off: keep the last digest elsewhere and give it to `verify`. Invariant: an event is durable
before it is acknowledged, and holds no secret and no text of a prompt.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from serve.errors import Unavailable

AUDIT_FILE = "audit.jsonl"
# before the first record
GENESIS = "0" * 64
_TAIL_BYTES = 64 << 10
_MAX_SUBJECT_CHARS = 256


class AuditEvent(StrEnum):
    """What is recorded."""

    KEY_MADE = "key_made"
    KEY_REVOKED = "key_revoked"
    KEY_ROTATED = "key_rotated"
    UPLOAD = "upload"
    DELETE = "delete"
    ALIAS = "alias"
    PROMOTE = "promote"
    ROLLBACK = "rollback"
    CANARY = "canary"
    COLLECT = "collect"
    SHARED = "shared"
    TRAINING = "training"
    DATA_FILE = "data_file"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class Broken:
    """Where a log is not what was written: the first line that does not fit, from 1, and why."""

    line: int
    reason: str


class AuditLog:
    """Appends to one file. Threads and processes may share it: each append holds the file's lock."""

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock

    def append(self, event: AuditEvent, *, tenant: str, key_id: str, subject: str, detail: str = "") -> str:
        """Record one event and return its digest once it is durable.

        Args:
            tenant, key_id: who did it. subject: the key or adapter it was done to. detail: a few words.
        Raises:
            Unavailable: the file cannot be written, or its last record is damaged; nothing was recorded.
        Notes: half a line at the end is a record whose writer died before it was acknowledged; it is removed.
        """
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                return self._append(descriptor, event, [tenant, key_id, subject[:_MAX_SUBJECT_CHARS], detail])
            finally:
                os.close(descriptor)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable("the audit log cannot be written; try again later", code="audit_unavailable") from error

    def _append(self, descriptor: int, event: AuditEvent, values: list[str]) -> str:
        number, previous, size = _end_of(descriptor)
        tenant, key_id, subject, detail = values
        record: dict[str, str | int] = {
            "number": number + 1,
            "time": int(self._clock()),
            "event": event.value,
            "tenant": tenant,
            "key": key_id,
            "subject": subject,
            "detail": detail,
            "previous": previous,
        }
        record["digest"] = digest_of(record)
        line = json.dumps(record).encode() + b"\n"
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError("the disk is full")
            os.fsync(descriptor)
        except OSError:
            # half a line would break the chain for all who come after
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
        return str(record["digest"])


def digest_of(record: dict[str, str | int]) -> str:
    """Return the digest of a record's other fields."""
    facts = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(lines: Iterable[bytes], *, head: str | None = None) -> Broken | None:
    """Return the first place where a log was changed, None where nowhere.

    Args:
        head: the digest of the last record, from elsewhere; without it a log whose end was cut off looks whole.
    """
    previous, number = GENESIS, 0
    for number, line in enumerate(lines, start=1):
        record = _read(line)
        if record is None:
            return Broken(number, "not a record")
        if record.get("number") != number:
            return Broken(number, f"numbered {record.get('number')!r}")
        if record.get("previous") != previous:
            return Broken(number, "does not follow the record before it")
        if record.get("digest") != digest_of(record):
            return Broken(number, "was altered")
        previous = str(record["digest"])
    if head is not None and head != previous:
        return Broken(number + 1, "the end is missing")
    return None


def _read(line: bytes) -> dict[str, str | int] | None:
    """Return a record, None if the line is not exactly what `append` writes of it."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or json.dumps(record).encode() + b"\n" != line:
        return None
    return record


def _end_of(descriptor: int) -> tuple[int, str, int]:
    """Return the last whole record's number and digest, and the size up to its end."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - _TAIL_BYTES)
    tail = os.pread(descriptor, _TAIL_BYTES, start)
    whole, newline, torn = tail.rpartition(b"\n")
    if torn:
        os.ftruncate(descriptor, size - len(torn))
    if not newline:
        if start:
            raise ValueError("the last record is not one of ours")
        return 0, GENESIS, 0
    record = json.loads(whole.rpartition(b"\n")[2])
    return int(record["number"]), str(record["digest"]), size - len(torn)

"""API keys: their text, the hash that is kept of them, and what is known of one.

A key is `pk_<id>_<secret><crc>`: 16 hex digits of id, 64 of secret (256 bits), 8 of CRC-32 over all before it, which
lets a scanner or a person tell a mistyped key without asking. Only HMAC-SHA256(pepper, secret) is kept: secrets of 256
bits need no slow hash, and a slow one would itself be an attack on the server. Invariant: the secret exists in the
answer that made it and nowhere else.
"""

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass

from serve.tenants.principal import Principal, Scope

_KEY = re.compile(r"pk_([0-9a-f]{16})_([0-9a-f]{64})([0-9a-f]{8})\Z")
_ID_BYTES, _SECRET_BYTES = 8, 32


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key. Times are unix seconds; `expires` None: never; `revoked` None: not revoked."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]
    # HMAC-SHA256(pepper, secret); never shown
    mac: bytes
    created: int
    expires: int | None = None
    revoked: int | None = None

    def is_valid_at(self, now: float) -> bool:
        """Return whether the key opens anything at this time."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def principal(self) -> Principal:
        """Return who calls with this key."""
        return Principal(self.tenant, self.scopes, self.key_id)


@dataclass(frozen=True, slots=True)
class ParsedKey:
    """The two halves of a well-formed key."""

    key_id: str
    secret: str


def mint(
    tenant: str, scopes: frozenset[Scope], pepper: bytes, *, now: int, expires: int | None
) -> tuple[str, KeyRecord]:
    """Return a new key's text, to be shown once, and the record to keep."""
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES)
    return key_text(key_id, secret), KeyRecord(key_id, tenant, scopes, mac_of(secret, pepper), now, expires)


def key_text(key_id: str, secret: str) -> str:
    """Return the text of a key with its checksum."""
    body = f"pk_{key_id}_{secret}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def parse_key(text: str) -> ParsedKey | None:
    """Read a key's text; None if it is none, or mistyped."""
    match = _KEY.match(text)
    if match is None or key_text(match[1], match[2]) != text:
        return None
    return ParsedKey(match[1], match[2])


def mac_of(secret: str, pepper: bytes) -> bytes:
    """Return what is kept of a secret."""
    return hmac.digest(pepper, secret.encode(), hashlib.sha256)


def matches(record: KeyRecord | None, secret: str, pepper: bytes) -> bool:
    """Return whether a secret is the record's, doing the same work without a record."""
    kept = record.mac if record is not None else bytes(hashlib.sha256().digest_size)
    is_equal = hmac.compare_digest(mac_of(secret, pepper), kept)
    return is_equal and record is not None

"""What a store knows of signatures: what an upload brought, what was found, and whether it may be served.

Owns the facts that a version keeps and the protocol of the gate; the checking itself is `signing.gate`'s, since it
needs a library that is an extra. Invariant: a version's facts hold the bundle that was verified, so it
can be verified again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from adapters_store.registry import AdapterVersion
from adapters_store.strict_json import Json

Facts = dict[str, Json]


class Status(StrEnum):
    """What was found of an upload's signature."""

    VERIFIED = "verified"
    UNSIGNED = "unsigned"
    INVALID = "invalid"
    # the server checked none
    NOT_CHECKED = "not_checked"


@dataclass(frozen=True, slots=True)
class Sent:
    """The files of an upload as the client named them, its signature, and what is said of how it was made."""

    files: Mapping[str, Path] = field(default_factory=dict)
    bundle: bytes | None = None
    provenance: Path | None = None


class SignatureGate(Protocol):
    """Decides about signatures. Thread-safe."""

    def check_upload(self, owner: str, sent: Sent) -> Facts | None:
        """Return what a version of this owner keeps about its signature.

        Raises:
            SignatureInvalid: it may not be published.
        """
        ...

    def check_promotion(self, version: AdapterVersion) -> None:
        """Check a version's signature again, before its image is brought to a faster tier or used there.

        Raises:
            SignatureInvalid: it may not be served.
        """
        ...


class OpenGate:
    """The gate of a store that checks no signatures: it says so of those that come."""

    def check_upload(self, owner: str, sent: Sent) -> Facts | None:
        """Keep that there was one."""
        return None if sent.bundle is None else {"status": Status.NOT_CHECKED.value}

    def check_promotion(self, version: AdapterVersion) -> None:
        """Let it pass."""


def shown(signature: Facts | None) -> Facts:
    """Return what people are told of a version's signature: all but the bundle."""
    facts = {"status": Status.UNSIGNED.value} if signature is None else signature
    return {key: value for key, value in facts.items() if key != "bundle"}

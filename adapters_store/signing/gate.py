"""The gate that checks signatures: at the upload over every byte of its files, later over the bundle that was kept.

Owns the policy. At the upload the bundle must be signed by a key that counts for the owner and name exactly the files
that were sent, with their hashes. Later the files are gone, converted; what is checked again is that the kept bundle is
the one that was verified, that its signature holds and that its key still counts. Invariants: with `require` nothing
unverified is published or served; with `warn` it is, and every case is logged and kept with the version.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from adapters_store.errors import storage_errors
from adapters_store.made_by import read_provenance
from adapters_store.names import owner_of
from adapters_store.registry import AdapterVersion
from adapters_store.signatures import Facts, Sent, Status
from adapters_store.signing.bundle import SIGNATURE_PART, Bundle, Statement, read_bundle
from adapters_store.signing.keys import TrustedKey
from adapters_store.signing.trust import TrustFolder
from adapters_store.strict_json import Json
from adapters_store.version_errors import SignatureInvalid

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_MAX_REMEMBERED = 1 << 14


class TrustedKeysGate:
    """Checks against a folder of keys. `is_required`: refuse what fails; else warn."""

    def __init__(self, trust: TrustFolder, *, is_required: bool) -> None:
        self._trust = trust
        self._is_required = is_required
        self._lock = threading.Lock()
        # (owner, bundle's hash, root digest, keys) -> why it fails, "" if it holds
        self._remembered: OrderedDict[tuple[object, ...], str] = OrderedDict()

    def check_upload(self, owner: str, sent: Sent) -> Facts | None:
        """Return what a version of this owner keeps about its signature; raises SignatureInvalid."""
        if sent.bundle is None:
            return self._failed(Status.UNSIGNED, f"the upload is not signed: it has no {SIGNATURE_PART}")
        try:
            bundle = read_bundle(sent.bundle)
            key = find_signer(bundle, self._trust.roots().of(owner))
            check_sent(bundle.statement, sent)
        except SignatureInvalid as error:
            return self._failed(Status.INVALID, error.message)
        statement = bundle.statement
        return {
            "status": Status.VERIFIED.value,
            "signer": key.name,
            "key": f"sha256:{key.hint}",
            "model": statement.name,
            "files_digest": f"sha256:{statement.digest}",
            "provenance": statement.provenance,
            "bundle": sent.bundle.decode("utf-8"),
        }

    def check_promotion(self, version: AdapterVersion) -> None:
        """Check a version's signature again; raises SignatureInvalid. Cheap once it was checked with these keys."""
        reason = self._why_not(version)
        if not reason:
            return
        message = f"adapter '{version.name}' version {version.version} may not be served: {reason}"
        if self._is_required:
            raise SignatureInvalid(f"{message}; upload it again with a signature of a trusted key", param="model")

    def _why_not(self, version: AdapterVersion) -> str:
        facts = version.signature or {}
        if facts.get("status") != Status.VERIFIED.value:
            return str(facts.get("reason") or "it was published without a verified signature")
        owner, raw, digest = owner_of(version.name), str(facts.get("bundle")).encode(), str(facts.get("files_digest"))
        roots = self._trust.roots()
        known = (owner, hashlib.sha256(raw).hexdigest(), digest, roots.stamp)
        with self._lock:
            if known in self._remembered:
                self._remembered.move_to_end(known)
                return self._remembered[known]
        reason = recheck(raw, digest, roots.of(owner))
        with self._lock:
            self._remembered[known] = reason
            if len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        if reason:
            logger.warning("adapter '%s' version %d: %s", version.name, version.version, reason)
        return reason

    def _failed(self, status: Status, reason: str) -> Facts:
        if self._is_required:
            raise SignatureInvalid(reason, param=SIGNATURE_PART)
        logger.warning("an upload is accepted although %s", reason)
        return {"status": status.value, "reason": reason}


def find_signer(bundle: Bundle, keys: tuple[TrustedKey, ...]) -> TrustedKey:
    """Return the key that signed; raises SignatureInvalid if none of these did."""
    for key in keys:
        if bundle.hint in ("", key.hint) and key.has_signed(bundle.signed, bundle.signature):
            return key
    named = f"; it names key sha256:{bundle.hint[:64]!a}" if bundle.hint else ""
    raise SignatureInvalid(
        f"{SIGNATURE_PART} is not signed by any of the {len(keys)} keys that count for this owner{named}",
        param=SIGNATURE_PART,
    )


def check_files(signed: Mapping[str, str], sent: Mapping[str, Path]) -> None:
    """Refuse files that are not exactly those that were signed; raises SignatureInvalid."""
    for name in sorted(signed.keys() - sent.keys()):
        raise SignatureInvalid(f"{name!a} was signed and not sent; send all signed files", param=SIGNATURE_PART)
    for name in sorted(sent.keys() - signed.keys()):
        raise SignatureInvalid(f"{name!a} was sent and not signed; sign all files that are sent", param=SIGNATURE_PART)
    for name, path in sorted(sent.items()):
        if sha256_of(path) != signed[name]:
            raise SignatureInvalid(f"{name!a} is not the file that was signed", param=SIGNATURE_PART)


def check_sent(statement: Statement, sent: Sent) -> None:
    """Refuse files, or a word on how they were made, that are not what was signed; raises SignatureInvalid."""
    if sent.provenance is not None and sent.provenance.name in statement.files:
        check_files(statement.files, {**sent.files, sent.provenance.name: sent.provenance})
        return
    check_files(statement.files, sent.files)
    check_provenance(statement.provenance, sent.provenance)


def check_provenance(signed: Mapping[str, Json], sent: Path | None) -> None:
    """Refuse a provenance that is not the one that was signed, itself or by its hash; raises SignatureInvalid."""
    if sent is None or signed == {"sha256": sha256_of(sent)}:
        return
    if signed != read_provenance(sent):
        raise SignatureInvalid(f"{sent.name} is not the one that was signed", param=SIGNATURE_PART)


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256."""
    digest = hashlib.sha256()
    with storage_errors(), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def recheck(raw: bytes, digest: str, keys: tuple[TrustedKey, ...]) -> str:
    """Return why a bundle that was kept holds no more for files of this digest, "" if it does."""
    try:
        bundle = read_bundle(raw)
        find_signer(bundle, keys)
    except SignatureInvalid as error:
        return error.message
    return "" if digest == f"sha256:{bundle.statement.digest}" else "its signature is over other files"

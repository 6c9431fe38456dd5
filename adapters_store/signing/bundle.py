"""OpenSSF model signing's bundle: a Sigstore bundle whose DSSE envelope holds an in-toto statement of file hashes.

Owns the form, read as strictly as it is written: what is not exactly a signature by one key over whole files is
refused. Knows no key and trusts nothing. Invariant: the files that `read_bundle` returns are those of the very payload
bytes that the signature is over.
Source: OpenSSF Model Signing 1.0 (predicate model_signing/signature/v1.0), DSSE 1.0, Sigstore bundle 0.3.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from adapters_store.errors import StoreError
from adapters_store.json_values import json_list, json_object, text
from adapters_store.strict_json import Json, canonical_json, read_json
from adapters_store.version_errors import SignatureInvalid

# the file that a signed folder has beside the others
SIGNATURE_PART = "model.sig"
MAX_BUNDLE_BYTES = 1 << 20
_MAX_FILES = 4096
MAX_PROVENANCE_BYTES = 32 << 10

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Statement:
    """What was signed: the model's name, the digest over all files' digests, each file's SHA-256."""

    name: str
    digest: str
    files: Mapping[str, str]
    # what the signer says of the model's making; our own trainer does
    provenance: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A signature and what it is over; `hint` names the key by the SHA-256 of its PEM text, "" names none."""

    statement: Statement
    signed: bytes
    signature: bytes
    hint: str


def read_bundle(raw: bytes) -> Bundle:
    """Read a bundle; whether its signature holds is the key's business.

    Raises:
        SignatureInvalid: another form, a certificate's or keyless signature, shards of files, digests that do not fit.
    """
    try:
        outer = read_json(raw, SIGNATURE_PART, max_bytes=MAX_BUNDLE_BYTES)
        _check(outer["mediaType"], _MEDIA_TYPE, "media type")
        material = json_object(outer["verificationMaterial"])
        if "publicKey" not in material:
            raise _invalid("it is a certificate's or keyless signature; this server trusts public keys only")
        hint = json_object(material["publicKey"]).get("hint") or ""
        envelope = json_object(outer["dsseEnvelope"])
        _check(envelope["payloadType"], _PAYLOAD_TYPE, "payload type")
        payload = _base64(envelope["payload"])
        signatures = json_list(envelope["signatures"])
        if len(signatures) != 1:
            raise _invalid(f"it holds {len(signatures)} signatures; one is read")
        signature = _base64(json_object(signatures[0])["sig"])
        return Bundle(_read_statement(payload), pre_authentication(payload), signature, text(hint))
    except (KeyError, TypeError) as error:
        raise _invalid(f"it lacks what a model signature has ({type(error).__name__})") from error
    except SignatureInvalid:
        raise
    except StoreError as error:
        raise _invalid(error.message) from error


def write_bundle(statement: bytes, signature: bytes, hint: str) -> bytes:
    """Return the bundle of a statement's bytes, signed by the key of that hint."""
    envelope: dict[str, Json] = {
        "payload": base64.b64encode(statement).decode(),
        "payloadType": _PAYLOAD_TYPE,
        "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
    }
    material: dict[str, Json] = {"publicKey": {"hint": hint}, "tlogEntries": []}
    return canonical_json({"mediaType": _MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope})


def write_statement(statement: Statement) -> bytes:
    """Return the payload that says this; the digest is made from the files'."""
    names = sorted(statement.files)
    predicate: dict[str, Json] = {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE_PART],
        },
        "resources": [{"name": name, "algorithm": "sha256", "digest": statement.files[name]} for name in names],
    }
    if statement.provenance:
        predicate["provenance"] = dict(statement.provenance)
    subject: dict[str, Json] = {
        "name": statement.name,
        "digest": {"sha256": root_digest([statement.files[name] for name in names])},
    }
    return canonical_json(
        {"_type": _STATEMENT_TYPE, "subject": [subject], "predicateType": _PREDICATE_TYPE, "predicate": predicate}
    )


def root_digest(digests: list[str]) -> str:
    """Return the digest over files' digests, in their order."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def pre_authentication(payload: bytes) -> bytes:
    """Return the bytes that DSSE signs for a payload."""
    return b"DSSEv1 %d %b %d %b" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _read_statement(payload: bytes) -> Statement:
    body = read_json(payload, "its statement", max_bytes=MAX_BUNDLE_BYTES)
    _check(body["_type"], _STATEMENT_TYPE, "statement type")
    _check(body["predicateType"], _PREDICATE_TYPE, "predicate type")
    subjects = json_list(body["subject"])
    if len(subjects) != 1:
        raise _invalid(f"it is about {len(subjects)} models; one is read")
    subject = json_object(subjects[0])
    predicate = json_object(body["predicate"])
    how = json_object(predicate["serialization"])
    _check(how["method"], "files", "method")
    _check(how["hash_type"], "sha256", "hash")
    resources = [json_object(each) for each in json_list(predicate["resources"])]
    if not 0 < len(resources) <= _MAX_FILES:
        raise _invalid(f"it names {len(resources)} files; 1 to {_MAX_FILES} are read")
    files: dict[str, str] = {}
    for resource in resources:
        _check(resource["algorithm"], "sha256", "hash")
        name, digest = text(resource["name"]), text(resource["digest"])
        if name in files or not _SHA256.match(digest):
            raise _invalid("it names a file twice, or a digest that is none")
        files[name] = digest
    digest = text(json_object(subject["digest"])["sha256"])
    if digest != root_digest([*files.values()]):
        raise _invalid("its files' digests do not add up to the model's digest")
    provenance = json_object(predicate.get("provenance", {}))
    if len(canonical_json(dict(provenance))) > MAX_PROVENANCE_BYTES:
        raise _invalid(f"its provenance is longer than {MAX_PROVENANCE_BYTES} bytes")
    return Statement(text(subject["name"])[:256], digest, files, dict(provenance))


def _base64(value: Json) -> bytes:
    try:
        return base64.b64decode(text(value), validate=True)
    except binascii.Error as error:
        raise _invalid("a part of it is not base64") from error


def _check(found: Json, expected: str, what: str) -> None:
    if found != expected:
        raise _invalid(f"its {what} is {ascii(found)[:80]}, not {expected}")


def _invalid(reason: str) -> SignatureInvalid:
    return SignatureInvalid(f"{SIGNATURE_PART} is no signature that is read here: {reason}", param=SIGNATURE_PART)

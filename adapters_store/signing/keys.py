"""Public and private keys of model signatures: elliptic curves P-256, P-384, P-521, and Ed25519.

Owns the arithmetic's library, which is an extra. Invariants: a key of another kind is refused when it is read, never
when it is needed; the hash goes by the curve, as in the standard, so nobody chooses a weaker one.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from adapters_store.errors import InvalidOption

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_KINDS = "elliptic curve keys (P-256, P-384, P-521) and Ed25519 keys in PEM"
_MAX_KEY_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key and the file that it came from; `hint` is the SHA-256 of its PEM text, which bundles name it by."""

    name: str
    hint: str
    key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

    def has_signed(self, data: bytes, signature: bytes) -> bool:
        """Return whether this key made the signature over these bytes."""
        try:
            if isinstance(self.key, ed25519.Ed25519PublicKey):
                self.key.verify(signature, data)
            else:
                self.key.verify(signature, data, ec.ECDSA(_HASHES[self.key.curve.name]))
        except InvalidSignature:
            return False
        return True


class SigningKey:
    """A private key."""

    def __init__(self, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
        self._key = key
        self.public = trusted_key("", key.public_key())

    @classmethod
    def read(cls, path: Path) -> "SigningKey":
        """Read a PEM file; raises InvalidOption."""
        raw = _read(path)
        try:
            key = serialization.load_pem_private_key(raw, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise InvalidOption(f"{path}: not a private key without a password in PEM", param="key") from error
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return cls(key)
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _HASHES:
            return cls(key)
        raise InvalidOption(f"{path}: this key is of another kind; known: {_KINDS}", param="key")

    def sign(self, data: bytes) -> bytes:
        """Return the signature over these bytes."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, ec.ECDSA(_HASHES[self._key.curve.name]))


def read_public_key(path: Path) -> TrustedKey:
    """Read a PEM file; raises InvalidOption."""
    raw = _read(path)
    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidOption(f"{path}: not a public key in PEM", param="trust_roots") from error
    if isinstance(key, ed25519.Ed25519PublicKey):
        return trusted_key(path.name, key)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _HASHES:
        return trusted_key(path.name, key)
    raise InvalidOption(f"{path}: this key is of another kind; known: {_KINDS}", param="trust_roots")


def trusted_key(name: str, key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> TrustedKey:
    """Return a key under a name, with its hint."""
    return TrustedKey(name, hashlib.sha256(public_pem(key)).hexdigest(), key)


def public_pem(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> bytes:
    """Return a public key's PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise InvalidOption(f"{path}: {error.strerror}", param="key") from error

"""Whose signatures count for whose adapters: a folder of public keys, read again while the server runs.

Owns the folder's meaning: `DIR/*.pem` count for everybody, `DIR/TENANT/*.pem` for that tenant's adapters only; a single
file counts for everybody. Invariant: a key that was removed counts no longer than a second, and a folder that cannot be
read trusts nobody.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.errors import InvalidOption, StorageFailed
from adapters_store.signing.keys import TrustedKey, read_public_key

_MAX_AGE_S = 1.0
# the operator's own adapters, whose names have no owner
OPERATOR = "local"


@dataclass(frozen=True, slots=True)
class Roots:
    """The keys as of one moment; `stamp` changes with them."""

    everybody: tuple[TrustedKey, ...] = ()
    tenants: Mapping[str, tuple[TrustedKey, ...]] = field(default_factory=dict)

    @property
    def stamp(self) -> tuple[object, ...]:
        """Return a value that is equal for equal keys."""
        tenants = [(tenant, *(key.hint for key in keys)) for tenant, keys in sorted(self.tenants.items())]
        return (*(key.hint for key in self.everybody), *tenants)

    def of(self, owner: str) -> tuple[TrustedKey, ...]:
        """Return the keys that count for an owner's adapters; "" is the operator."""
        return (*self.everybody, *self.tenants.get(owner or OPERATOR, ()))


class TrustFolder:
    """A folder of keys, or one file. Thread-safe."""

    def __init__(self, path: Path, *, monotonic: Callable[[], float]) -> None:
        """Read it.

        Raises:
            InvalidOption: it cannot be read, or holds what is no public key.
        """
        self._path = path
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._roots, self._read_at = self._read(), monotonic()

    def roots(self) -> Roots:
        """Return the keys, at most a second old; raises StorageFailed."""
        with self._lock:
            if self._monotonic() - self._read_at >= _MAX_AGE_S:
                try:
                    self._roots, self._read_at = self._read(), self._monotonic()
                except InvalidOption as error:
                    raise StorageFailed("the keys that signatures are checked with cannot be read") from error
            return self._roots

    def _read(self) -> Roots:
        if self._path.is_file():
            return Roots((read_public_key(self._path),))
        try:
            entries = sorted(self._path.iterdir())
            folders = [entry for entry in entries if entry.is_dir()]
            tenants = {folder.name: _keys(sorted(folder.iterdir())) for folder in folders}
        except OSError as error:
            raise InvalidOption(f"{self._path}: {error.strerror}", param="trust_roots") from error
        return Roots(_keys(entries), tenants)


def _keys(entries: list[Path]) -> tuple[TrustedKey, ...]:
    return tuple(read_public_key(entry) for entry in entries if entry.suffix == ".pem")

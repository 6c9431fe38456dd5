"""An S3-compatible object store as the store of adapters uses it: whole objects, created once, read back, listed.

Owns the client and its bounds; knows nothing of adapters. Credentials come from the environment or the provider's
chain (AWS_ACCESS_KEY_ID, web identity, instance roles; AWS_ENDPOINT_URL for other providers), never from a URL.
Invariants: an object appears whole or not at all; of several that create one name exactly one succeeds, also when an
answer was lost; every call ends within bounds, with StoreAway if the store does not answer.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import S3Store

from adapters_store.errors import CorruptUpload, InvalidOption, StoreAway, storage_errors

_CONNECT_TIMEOUT = timedelta(seconds=2)
# of one request with a journal's entry or a manifest, and of one with a piece of an image
_SMALL_TIMEOUT_S, _PIECE_TIMEOUT_S = 5.0, 60.0
_RETRY_TIMEOUT = timedelta(seconds=5)
_MAX_RETRIES = 2
_PIECE_BYTES = 16 << 20
_NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing."""

    key: str
    num_bytes: int
    modified: datetime


class ObjectStore:
    """The objects under one prefix of one bucket. Thread-safe; all keys are relative to the prefix."""

    def __init__(self, url: str, *, small_timeout_s: float = _SMALL_TIMEOUT_S) -> None:
        """Connect lazily.

        Args:
            url: s3://BUCKET or s3://BUCKET/PREFIX, and nothing else.
            small_timeout_s: how long an entry or a manifest may take; replaced by tests.
        Raises:
            InvalidOption: the URL is another.
        """
        self.url = url
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
            raise InvalidOption(
                f"the object store {ascii(_without_user(url))[:200]} is not of the form s3://BUCKET/PREFIX; "
                "credentials come from the environment",
                param="blobs",
            )
        try:
            self._store, self._pieces = _connect(parts, small_timeout_s), _connect(parts, _PIECE_TIMEOUT_S)
        except (BaseError, ValueError) as error:
            raise InvalidOption(f"the object store {url} cannot be used: {error}", param="blobs") from error

    def get(self, key: str, *, max_bytes: int) -> bytes | None:
        """Return an object's bytes, None if there is none.

        Raises:
            CorruptUpload: it has more than `max_bytes`. StoreAway.
        """
        with _away():
            try:
                result = obstore.get(self._store, key)
            except (NotFoundError, FileNotFoundError):
                return None
            if result.meta["size"] > max_bytes:
                raise CorruptUpload(f"the object {key} has {result.meta['size']} bytes; at most {max_bytes} are read")
            return bytes(result.bytes())

    def exists(self, key: str) -> bool:
        """Return whether there is such an object; raises StoreAway."""
        with _away():
            try:
                obstore.head(self._store, key)
            except (NotFoundError, FileNotFoundError):
                return False
        return True

    def pieces(self, key: str) -> Iterator[bytes]:
        """Yield an object's bytes, a bounded request for each piece; nothing if there is none. Raises StoreAway."""
        with _away():
            try:
                num_bytes = obstore.head(self._store, key)["size"]
                for begin in range(0, num_bytes, _PIECE_BYTES):
                    end = min(begin + _PIECE_BYTES, num_bytes)
                    yield bytes(obstore.get_range(self._pieces, key, start=begin, end=end))
            except (NotFoundError, FileNotFoundError):
                return

    def create(self, key: str, data: bytes) -> bool:
        """Create an object durably; False if somebody else has.

        The store refuses a name that exists. A line with a random number behind the data tells our own object, whose
        answer was lost on the way, from another's; `read_created` takes it off again.
        """
        stamped = data + b"\n" + secrets.token_hex(_NONCE_BYTES).encode()
        with _away():
            try:
                obstore.put(self._store, key, stamped, mode="create", use_multipart=False)
            except AlreadyExistsError:
                is_ours_in_size = obstore.head(self._store, key)["size"] == len(stamped)
                return is_ours_in_size and self.get(key, max_bytes=len(stamped)) == stamped
        return True

    def read_created(self, key: str, *, max_bytes: int) -> bytes | None:
        """Return what was given to `create`, None if nothing was; raises StoreAway, CorruptUpload."""
        stamped = self.get(key, max_bytes=max_bytes)
        return None if stamped is None else stamped.rpartition(b"\n")[0]

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, whatever was there; raises StoreAway."""
        with _away():
            obstore.put(self._store, key, data, use_multipart=False)

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store, whatever was there; raises FileNotFoundError, StoreAway."""
        try:
            obstore.copy(self._pieces, source, target)
        except (NotFoundError, FileNotFoundError):
            raise FileNotFoundError(source) from None
        except (BaseError, OSError) as error:
            raise StoreAway() from error

    def put_file(self, key: str, path: Path) -> None:
        """Write a file's bytes as an object, whatever was there; raises StoreAway, StorageFailed."""
        with storage_errors(), path.open("rb") as file, _away():
            obstore.put(self._pieces, key, file)

    def list(self, prefix: str, *, after: str | None = None) -> Iterator[Listed]:
        """Yield the objects in the folder `prefix`, those alone whose key comes after another; raises StoreAway."""
        with _away():
            for batch in obstore.list(self._store, prefix, offset=after):
                for meta in batch:
                    yield Listed(meta["path"], meta["size"], meta["last_modified"])

    def delete(self, key: str) -> None:
        """Remove an object, if there is one; raises StoreAway."""
        with _away():
            try:
                obstore.delete(self._store, key)
            except (NotFoundError, FileNotFoundError):
                return


def _connect(parts: SplitResult, timeout_s: float) -> S3Store:
    timeout = timedelta(seconds=timeout_s)
    return S3Store(
        parts.netloc,
        prefix=parts.path.strip("/") or None,
        # plain http is for a store on the same host or in tests, and only if AWS_ENDPOINT_URL says so
        client_options={"timeout": timeout, "connect_timeout": _CONNECT_TIMEOUT, "allow_http": True},
        retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": _RETRY_TIMEOUT},
    )


def _without_user(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


@contextmanager
def _away() -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise StoreAway() from error

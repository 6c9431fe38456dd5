"""The server's own secret: what key hashes and prefix-cache salts are made with.

Owns its file. Invariant: the file is readable by its owner alone (or by our group, as pods mount it) or it
is not used, and it is made whole or not at all.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from serve.errors import StartError

PEPPER_FILE = "pepper"
_MIN_BYTES, _MAX_BYTES = 32, 4096


def read_pepper(path: Path, *, create: bool) -> bytes:
    """Return the secret in `path`.

    Args:
        create: make the file, with 32 random bytes, if it is not there.
    Raises:
        StartError: no such file, not ours alone, or too short.
    """
    try:
        if create:
            _create(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            pepper = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise StartError(f"the pepper {path}: {error.strerror}; `chorale keys create` makes one") from error
    if not stat.S_ISREG(facts.st_mode) or not _is_private(facts):
        raise StartError(f"the pepper {path} must be a file that only its owner can read: chmod 600 {path}")
    if not _MIN_BYTES <= len(pepper) <= _MAX_BYTES:
        raise StartError(f"the pepper {path} must hold {_MIN_BYTES} to {_MAX_BYTES} random bytes, not {len(pepper)}")
    return pepper


def tenant_salt(pepper: bytes, tenant: str) -> str:
    """Return the salt of a tenant's prefix hashes: nobody who lacks the pepper can compute another tenant's."""
    return hmac.digest(pepper, b"prefix cache\0" + tenant.encode(), hashlib.sha256).hex()


def pepper_mark(pepper: bytes) -> bytes:
    """Return what a key store remembers of the pepper that its keys were made with."""
    return hmac.digest(pepper, b"chorale key store", hashlib.sha256)


def check_mark(mark: bytes, kept: bytes) -> None:
    """Raise StartError unless both are of one pepper."""
    if not hmac.compare_digest(mark, kept):
        raise StartError(
            "the keys of this store were made with another pepper; name the file that they were made with "
            "(--pepper-file)"
        )


def _is_private(facts: os.stat_result) -> bool:
    mode = stat.S_IMODE(facts.st_mode)
    # Kubernetes mounts a secret as root's, readable by the pod's group, which is the server's own
    is_mounted = mode == 0o440 and facts.st_gid == os.getegid()
    return is_mounted or not mode & 0o077


def _create(path: Path) -> None:
    """Link a complete file to its name: of two that create it at once, one wins and both read the same bytes."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_MIN_BYTES))
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(draft, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink()

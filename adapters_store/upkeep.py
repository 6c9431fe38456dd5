"""What operators do to a whole store: compare it with its registry, and remove what nothing points to.

Owns no names and decides nothing about adapters. Invariants: verifying changes nothing; collecting removes under the
store's lock only what the registry, read there, does not need.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters_store.blobs import Blobs, open_image
from adapters_store.errors import AdapterNotFound, StoreError, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.locks import StoreLock
from adapters_store.registry import AdapterVersion, Registry
from adapters_store.staging import Staging
from adapters_store.steering import older_than


@dataclass(frozen=True, slots=True)
class Finding:
    """One object: whose it is ("" for nobody's) and what is wrong with it ("" for nothing)."""

    digest: str
    owner: str
    problem: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What went."""

    num_objects: int
    num_bytes: int


def verify(root: Path, registry: Registry) -> Iterator[Finding]:
    """Hash every byte that a version points to, and name the objects that none points to."""
    owners: dict[str, list[str]] = {}
    for version in all_versions(registry):
        owners.setdefault(version.digest, []).append(f"{version.name}@{version.version}")
    for digest, names in sorted(owners.items(), key=lambda item: item[1]):
        problem = ""
        try:
            open_image(root / "objects", digest)
        except StoreError as error:
            problem = error.message
        yield Finding(digest, ", ".join(names), problem)
    kept = registry.digests(retired_since=0)
    with storage_errors():
        for digest in sorted({entry.name for entry in os.scandir(root / "objects")} - owners.keys()):
            yield Finding(digest, "", "" if digest in kept else "nothing points to it; `chorale store gc` removes it")


def all_versions(registry: Registry) -> list[AdapterVersion]:
    """Return every version of every name."""
    return [version for current in registry.all_current() for version in registry.versions(current.name)]


def retire_old(registry: Registry, *, keep: int, now: int) -> list[AdapterVersion]:
    """Forget all but each name's newest versions, and those that a name, an alias or a rollback needs; return them.

    Raises:
        InvalidOption: fewer than one to keep. RegistryUnavailable.
    """
    choose = older_than(keep)
    gone: list[AdapterVersion] = []
    for current in registry.all_current():
        # somebody may have deleted the name meanwhile
        with suppress(AdapterNotFound):
            gone += registry.retire(current.name, choose, now=now)
    return gone


def collect(root: Path, registry: Registry, *, retired_since: int) -> Collected:
    """Remove staging folders whose owner died, and objects that nothing has pointed to since then."""
    files = FileSystem()
    staging, blobs = Staging(root / "staging", files), Blobs(root / "objects", files)
    num_bytes = 0
    with StoreLock(root / "lock").held(), storage_errors():
        staging.sweep()
        unneeded = sorted(blobs.digests() - registry.digests(retired_since=retired_since) - staging.held())
        for digest in unneeded:
            num_bytes += sum(entry.stat().st_size for entry in os.scandir(root / "objects" / digest))
            blobs.remove(digest)
    return Collected(len(unneeded), num_bytes)

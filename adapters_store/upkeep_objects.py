"""Upkeep of a store whose objects lie in an object store: compare it with its registry, remove what nothing needs.

Owns no names. Invariants: verifying changes nothing; collecting removes only objects that the registry has not needed
for as long as in a folder, and that are old enough not to belong to an upload on its way, since no lock tells those.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from adapters_store.blob_cache import OBJECTS, BlobCache, damage_of
from adapters_store.object_store import Listed, ObjectStore
from adapters_store.registry import Registry
from adapters_store.upkeep import Collected, Finding, all_versions

# an upload writes its object, and its name follows within moments
_MIN_AGE = timedelta(days=1)


def verify_objects(objects: ObjectStore, cache: BlobCache, registry: Registry) -> Iterator[Finding]:
    """Read every byte that a version points to, and name the objects that none points to; raises StoreAway."""
    owners: dict[str, list[str]] = {}
    for version in all_versions(registry):
        owners.setdefault(version.digest, []).append(f"{version.name}@{version.version}")
    for digest, names in sorted(owners.items(), key=lambda item: item[1]):
        yield Finding(digest, ", ".join(names), damage_of(cache, digest))
    kept = registry.digests(retired_since=0)
    for digest in sorted(_by_digest(objects).keys() - owners.keys()):
        yield Finding(digest, "", "" if digest in kept else "nothing points to it; `chorale store gc` removes it")


def collect_objects(
    objects: ObjectStore, registry: Registry, *, retired_since: int, now: datetime | None = None
) -> Collected:
    """Remove objects that nothing has pointed to since then, and that are a day old; raises StoreAway."""
    oldest_kept = (now or datetime.now(UTC)) - _MIN_AGE
    # listed first: an object that comes later is not in the list, whatever the registry says then
    found = _by_digest(objects)
    needed = registry.digests(retired_since=retired_since)
    gone = {
        digest: files
        for digest, files in found.items()
        if digest not in needed and all(file.modified < oldest_kept for file in files)
    }
    for files in gone.values():
        # the manifest first: an object without one is none
        for file in sorted(files, key=lambda file: file.key):
            objects.delete(file.key)
    return Collected(len(gone), sum(file.num_bytes for files in gone.values() for file in files))


def _by_digest(objects: ObjectStore) -> dict[str, list[Listed]]:
    found: dict[str, list[Listed]] = {}
    for listed in objects.list(OBJECTS):
        found.setdefault(listed.key.split("/")[1], []).append(listed)
    return found

"""The judge of what a crash left behind: torn, lost, resurrected or orphaned, in words; an empty list is innocence.

Owns the meaning of "no torn adapter visible, no acknowledged one lost, no orphan after the sweep". It is proved by
planted bugs in `test_crash_states.py` and `test_crash.py`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.errors import StoreError
from adapters_store.registry_sqlite import SqliteRegistry
from adapters_store.store import AdapterStore
from tests.store.folders import open_store

# every deleted adapter's hour of grace is over
AFTER_THE_GRACE_S = 7200.0
Versions = dict[str, dict[int, str]]


@dataclass
class Expected:
    """What the clients know: versions by name and number, and per name the change that was not answered, if any."""

    versions: Versions = field(default_factory=dict)
    unanswered: dict[str, str] = field(default_factory=dict)

    def try_to(self, change: str, name: str) -> None:
        """Note that a client asked for a "put" or "del" of `name`."""
        self.unanswered[name] = change

    def acknowledge_put(self, name: str, version: int, digest: str) -> None:
        self.versions.setdefault(name, {})[version] = digest
        self.unanswered.pop(name, None)

    def acknowledge_delete(self, name: str) -> None:
        self.versions.pop(name, None)
        self.unanswered.pop(name, None)

    def allows(self, name: str, found: dict[int, str]) -> bool:
        """Return whether the store may hold exactly these versions of `name`."""
        known = self.versions.get(name, {})
        if found == known:
            return True
        if self.unanswered.get(name) == "del":
            return not found
        if self.unanswered.get(name) == "put":
            extra = {number: digest for number, digest in found.items() if number not in known}
            return len(extra) == 1 and {**known, **extra} == found
        return False


@dataclass(frozen=True)
class Verdict:
    """What is wrong, and what the store really holds."""

    violations: list[str]
    found: Versions


def later() -> float:
    """A clock that is two hours ahead."""
    return time.time() + AFTER_THE_GRACE_S


def judge(
    root: Path, expected: Expected, names: list[str], open_it: Callable[..., AdapterStore] = open_store
) -> Verdict:
    """Reopen a store as the next process would, which sweeps it, and compare it with what its client knows."""
    violations: list[str] = []
    store = open_it(root, clock=later)
    try:
        found: Versions = {}
        for name in names:
            versions = store._registry.versions(name)
            found[name] = {version.version: version.digest for version in versions}
            if bool(versions) != (store.resolve(name) is not None):
                violations.append(f"lost: {name} has versions but no current one")
            if not expected.allows(name, found[name]):
                violations.append(f"lost or resurrected: {name} is {found[name]}, known {expected.versions.get(name)}")
        digests = {digest for versions in found.values() for digest in versions.values()}
        for digest in sorted(digests):
            try:
                store.open_image(digest)
            except StoreError as error:
                violations.append(f"torn: {digest[:12]} is visible but {error.message}")
        on_disk = {path.name for path in (root / "objects").iterdir()}
        violations += [f"orphan object: {digest[:12]}" for digest in sorted(on_disk - digests)]
        violations += [f"orphan staging: {path.name}" for path in (root / "staging").iterdir()]
    finally:
        store.close()
    return Verdict(violations, {name: versions for name, versions in found.items() if versions})


def registry_bytes(registry: SqliteRegistry) -> bytes:
    """Return the registry as one durable file, as it would be read after a power loss right now."""
    with registry._writing:
        return registry._writer.serialize()

"""Names, versions and aliases in memory: what a store's changes come to, one after the other.

Owns the rules of a registry as a pure state machine: no disk, no clock, no lock. Invariants: `apply` depends on nothing
but the changes before, so all replicas that have followed the same journal answer alike; a number is never given twice
for names that differ only in case, deleted ones included.
"""

from adapters_store.errors import AdapterNotFound, NameTaken
from adapters_store.pointers import Named, Pointers
from adapters_store.registry import AdapterVersion, Traffic, move_of
from adapters_store.registry_changes import Change, Deleted, Everything, Founded, Moved, Published, Retired

_NOWHERE = Pointers()


class RegistryState:
    """What a registry knows. Callers serialise; a change is checked before it is written, then applied."""

    def __init__(self) -> None:
        self.store_id = ""
        self._versions: dict[str, dict[int, AdapterVersion]] = {}
        self._pointers: dict[str, Pointers] = {}
        self._folded: dict[str, str] = {}
        self._last_numbers: dict[str, int] = {}
        self._retired: dict[str, int] = {}

    def apply(self, change: Change) -> None:
        """Take over a change that the journal holds."""
        match change:
            case Founded(store_id):
                self.store_id = store_id
            case Published(version):
                self._publish(version)
            case Moved(name, move):
                self._pointers[name] = self._pointers[name].after(move)
            case Retired(name, numbers, now):
                self._retire(name, numbers, now)
            case Deleted(name, now):
                self._delete(name, now)
            case Everything():
                self._replace(change)

    def everything(self, *, retired_since: int = 0) -> Everything:
        """Return all of it as one change; digests that retired before that time are left out."""
        return Everything(
            store_id=self.store_id,
            versions=tuple(
                version for name in sorted(self._versions) for _, version in sorted(self._versions[name].items())
            ),
            pointers=dict(self._pointers),
            last_numbers=dict(self._last_numbers),
            retired={digest: since for digest, since in self._retired.items() if since >= retired_since},
        )

    def next_number(self, name: str) -> int:
        """Return the number that the name's next version gets."""
        return self._last_numbers.get(name.casefold(), 0) + 1

    def check_free(self, name: str) -> None:
        """Raise NameTaken if `name` differs only in case from another, or spells an existing `name:alias`."""
        twin = self._folded.get(name.casefold(), name)
        if twin != name:
            raise NameTaken(
                f"adapter '{name}' differs only in case from the existing '{twin}'; choose another name", param="name"
            )
        owner, _, alias = name.rpartition(":")
        if owner in self._pointers and alias in self._pointers[owner].aliases:
            raise NameTaken(f"'{name}' is the alias '{alias}' of adapter '{owner}'; choose another name", param="name")

    def named(self, name: str) -> Named:
        """Return what a move of the name's pointers is decided by; raises AdapterNotFound."""
        if name not in self._pointers:
            raise AdapterNotFound(f"there is no adapter {ascii(name)[:140]}; GET /v1/adapters lists them", param="name")
        return Named(name, self._pointers[name], tuple(sorted(self._versions[name])), self._pointers.__contains__)

    def current(self, name: str) -> AdapterVersion | None:
        """Return the name's current version."""
        return self.version(name, self._at(name).current)

    def pointers(self, name: str) -> Pointers | None:
        """Return where a name points."""
        return self._pointers.get(name)

    def canary(self, name: str) -> int | None:
        """Return the version that gets a share of the plain name's requests."""
        return self._at(name).canary

    def traffic(self, name: str) -> Traffic | None:
        """Return what the plain name means, canary included."""
        current, pointers = self.current(name), self._at(name)
        return None if current is None else Traffic(current, self.version(name, pointers.canary or 0), pointers)

    def version(self, name: str, number: int) -> AdapterVersion | None:
        """Return one version by number."""
        return self._versions.get(name, {}).get(number)

    def aliased(self, name: str, alias: str) -> AdapterVersion | None:
        """Return the version that `name:alias` points to."""
        return self.version(name, self._at(name).aliases.get(alias, 0))

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return all versions of a name, oldest first."""
        return [version for _, version in sorted(self._versions.get(name, {}).items())]

    def all_current(self) -> list[AdapterVersion]:
        """Return the current version of every name, by name."""
        return [self._versions[name][pointers.current] for name, pointers in sorted(self._pointers.items())]

    def digests(self, *, retired_since: int) -> set[str]:
        """Return every digest that some version points to, or that was retired at or after that time."""
        pointed = {version.digest for numbered in self._versions.values() for version in numbered.values()}
        return pointed | {digest for digest, since in self._retired.items() if since >= retired_since}

    def _at(self, name: str) -> Pointers:
        return self._pointers.get(name, _NOWHERE)

    def _publish(self, version: AdapterVersion) -> None:
        folded = version.name.casefold()
        self._versions.setdefault(version.name, {})[version.version] = version
        self._pointers[version.name] = self._at(version.name).after(move_of(version))
        self._folded[folded] = version.name
        self._last_numbers[folded] = version.version

    def _retire(self, name: str, numbers: tuple[int, ...], now: int) -> None:
        for number in numbers:
            self._retired[self._versions[name].pop(number).digest] = now
        self._pointers[name] = self._pointers[name].without(numbers)

    def _delete(self, name: str, now: int) -> None:
        for version in self._versions.pop(name, {}).values():
            self._retired[version.digest] = now
        if self._pointers.pop(name, None) is not None:
            del self._folded[name.casefold()]

    def _replace(self, everything: Everything) -> None:
        self.store_id = everything.store_id
        self._versions = {}
        for version in everything.versions:
            self._versions.setdefault(version.name, {})[version.version] = version
        self._pointers = dict(everything.pointers)
        self._folded = {name.casefold(): name for name in everything.pointers}
        self._last_numbers = dict(everything.last_numbers)
        self._retired = dict(everything.retired)

"""Names, versions and aliases in memory: what a store's changes come to, one after the other.

Owns the rules of a registry as a pure state machine: no disk, no clock, no lock. Invariants: `apply` depends on nothing
but the changes before, so all replicas that have followed the same journal answer alike; a number is never given twice
for names that differ only in case, deleted ones included.
"""

from adapters_store.errors import AdapterNotFound, NameTaken
from adapters_store.registry import AdapterVersion
from adapters_store.registry_changes import Aliased, Change, Deleted, Everything, Founded, Published


class RegistryState:
    """What a registry knows. Callers serialise; a change is checked before it is written, then applied."""

    def __init__(self) -> None:
        self.store_id = ""
        self._versions: dict[str, dict[int, AdapterVersion]] = {}
        self._current: dict[str, int] = {}
        self._folded: dict[str, str] = {}
        self._aliases: dict[tuple[str, str], int] = {}
        self._last_numbers: dict[str, int] = {}
        self._retired: dict[str, int] = {}

    def apply(self, change: Change) -> None:
        """Take over a change that the journal holds."""
        match change:
            case Founded(store_id):
                self.store_id = store_id
            case Published(version):
                self._publish(version)
            case Aliased(name, alias, number):
                self._aliases[name, alias] = number
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
            current=dict(self._current),
            aliases=dict(self._aliases),
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
        if owner and (owner, alias) in self._aliases:
            raise NameTaken(f"'{name}' is the alias '{alias}' of adapter '{owner}'; choose another name", param="name")

    def check_alias(self, name: str, alias: str, version: int) -> None:
        """Raise AdapterNotFound or NameTaken if the alias cannot be set."""
        if version not in self._versions.get(name, {}):
            raise AdapterNotFound(f"adapter '{name}' has no version {version}", param="version")
        if f"{name}:{alias}" in self._current:
            raise NameTaken(f"an adapter is already called '{name}:{alias}'; choose another alias", param="alias")

    def current(self, name: str) -> AdapterVersion | None:
        """Return the name's current version."""
        return self.version(name, self._current.get(name, 0))

    def version(self, name: str, number: int) -> AdapterVersion | None:
        """Return one version by number."""
        return self._versions.get(name, {}).get(number)

    def aliased(self, name: str, alias: str) -> AdapterVersion | None:
        """Return the version that `name:alias` points to."""
        return self.version(name, self._aliases.get((name, alias), 0))

    def versions(self, name: str) -> list[AdapterVersion]:
        """Return all versions of a name, oldest first."""
        return [version for _, version in sorted(self._versions.get(name, {}).items())]

    def all_current(self) -> list[AdapterVersion]:
        """Return the current version of every name, by name."""
        return [self._versions[name][number] for name, number in sorted(self._current.items())]

    def digests(self, *, retired_since: int) -> set[str]:
        """Return every digest that some version points to, or that was retired at or after that time."""
        pointed = {version.digest for numbered in self._versions.values() for version in numbered.values()}
        return pointed | {digest for digest, since in self._retired.items() if since >= retired_since}

    def _publish(self, version: AdapterVersion) -> None:
        folded = version.name.casefold()
        self._versions.setdefault(version.name, {})[version.version] = version
        self._current[version.name] = version.version
        self._folded[folded] = version.name
        self._last_numbers[folded] = version.version

    def _delete(self, name: str, now: int) -> None:
        for version in self._versions.pop(name, {}).values():
            self._retired[version.digest] = now
        if self._current.pop(name, None) is not None:
            del self._folded[name.casefold()]
        self._aliases = {key: number for key, number in self._aliases.items() if key[0] != name}

    def _replace(self, everything: Everything) -> None:
        self.store_id = everything.store_id
        self._versions = {}
        for version in everything.versions:
            self._versions.setdefault(version.name, {})[version.version] = version
        self._current = dict(everything.current)
        self._folded = {name.casefold(): name for name in everything.current}
        self._aliases = dict(everything.aliases)
        self._last_numbers = dict(everything.last_numbers)
        self._retired = dict(everything.retired)

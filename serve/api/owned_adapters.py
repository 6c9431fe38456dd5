"""The adapter store as one principal sees it: whose an adapter is, and what others may see of it.

Owns the translation of names and every decision about ownership: the store itself keeps an adapter of tenant T as
`T/name`, the operator's (tenant `local`) as plain `name`. A client writes its own as `name`, others' as `owner/name`,
and finds the operator's shared ones by their plain name too, behind its own. Invariants: the API reaches the store
through this alone; a foreign private adapter and one that does not exist cost the same lookups and give the same
answer, because what is not shared is never looked up.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from adapters_store.canary import StickyId
from adapters_store.errors import AdapterNotFound
from adapters_store.formats import Declared
from adapters_store.names import check_name
from adapters_store.pointers import CANARY, Move, Pointers, Sticky
from adapters_store.proof import Proving
from adapters_store.steering import removable
from adapters_store.store import AdapterRef, AdapterStore, AdapterVersion, Upload
from adapters_store.upload import Wish
from serve.api.json_body import show
from serve.errors import AdapterForbidden
from serve.tenants.principal import LOCAL_TENANT, Principal, Scope

# names, as the store keeps them, that are shared with a tenant
SharedWith = Callable[[str], frozenset[str]]
Found = TypeVar("Found")
# inside the class, `list` is a method
Versions = list[AdapterVersion]


class OwnedAdapters:
    """What a principal may see and change. Thread-safe, as the store is."""

    def __init__(self, store: AdapterStore, served_name: str, principal: Principal, shared_with: SharedWith) -> None:
        self._store = store
        self._served_name = served_name
        self.principal = principal
        self._shared_with = shared_with
        self._is_operator = Scope.ADMIN in principal.scopes

    def seen_by(self, principal: Principal) -> "OwnedAdapters":
        """Return the same store as another principal sees it."""
        return OwnedAdapters(self._store, self._served_name, principal, self._shared_with)

    def resolve(self, model: str, sticky: StickyId | None = None, *, to_serve: bool = False) -> AdapterRef | None:
        """Return what `model` stands for; None if no adapter is meant that this principal may see.

        Args:
            sticky: whose request it is, where a canary may answer it.
            to_serve: it shall be loaded or used, so its signature must count.
        Raises:
            SignatureInvalid: this server does not serve it.
        """
        text = model.removeprefix(f"{self._served_name}:")
        # the store knows the prefix, too, and that an exact name comes before it
        own = self._own(model if self._is_local and "/" not in model else text)
        found = None if own is None else self._store.resolve(own, sticky)
        foreign = _stored(text)
        if found is None and foreign != own and self._may_name(foreign):
            found = self._store.resolve(foreign, sticky)
            found = found if found is not None and self._may_see(found.name) else None
        if found is None:
            return None
        if to_serve:
            self._store.check_promotion(found)
        return replace(found, name=self._shown(found.name))

    def list(self) -> Versions:
        """Return the current version of every adapter that this principal may see."""
        return [self._show(version) for version in self._store.list() if self._may_see(version.name)]

    def get(self, name: str) -> AdapterVersion:
        """Return the current version of `name`; raises AdapterNotFound."""
        return self._show(self._read(name, self._store.get))

    def bring(self, digest: str) -> None:
        """See that the files of a version that was found here lie in the store's folder; raises StoreError."""
        self._store.bring(digest)

    def versions(self, name: str) -> Versions:
        """Return all versions of `name`, oldest first; raises AdapterNotFound."""
        return [self._show(version) for version in self._read(name, self._store.versions)]

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let `name:alias` mean that version; raises InvalidName, NameTaken, AdapterNotFound, AdapterForbidden."""
        self._store.set_alias(self.owned_name(name), alias, version, by=self._by)

    def pointers(self, name: str) -> Pointers:
        """Return where `name` points and how it came to that; raises AdapterNotFound."""
        return self._read(name, self._store.pointers)

    def moves(self, name: str) -> Sequence[Move]:
        """Return who pointed where, which its owner alone reads; raises AdapterNotFound, AdapterForbidden."""
        return self._store.pointers(self.owned_name(name)).moves

    def promote(self, name: str, version: int | str, alias: str | None) -> AdapterVersion:
        """Let `name` or `name:alias` mean a version; raises as `AdapterStore.promote`, AdapterForbidden."""
        return self._show(self._store.promote(self.owned_name(name), version, alias, by=self._by))

    def rollback(self, name: str) -> AdapterVersion:
        """Let `name` mean what it meant before; raises as `AdapterStore.rollback`, AdapterForbidden."""
        return self._show(self._store.rollback(self.owned_name(name), by=self._by))

    def set_canary(self, name: str, version: int | str, percent: float, sticky: Sticky) -> Pointers:
        """Give a version a share of `name`'s requests; raises as `AdapterStore.set_canary`, AdapterForbidden."""
        return self._store.set_canary(self.owned_name(name), version, percent, sticky=sticky, by=self._by)

    def remove_alias(self, name: str, alias: str) -> Pointers:
        """Forget `name:alias`; raises AdapterNotFound, AdapterForbidden."""
        return self._store.remove_alias(self.owned_name(name), alias, by=self._by)

    def remove_version(self, name: str, version: int) -> AdapterVersion:
        """Forget one version that nothing holds; raises AdapterNotFound, AdapterInUse, AdapterForbidden."""
        return self._show(self._store.retire(self.owned_name(name), removable(version))[0])

    def delete(self, name: str) -> None:
        """Forget `name` with all versions and aliases; raises AdapterNotFound, AdapterForbidden."""
        self._store.delete(self.owned_name(name))

    def stage(self) -> Upload:
        """Begin an upload; `commit` publishes it."""
        return self._store.stage()

    def commit(
        self, upload: Upload, name: str, declared: Declared, proving: Proving, *, staged: bool = False
    ) -> AdapterVersion:
        """Publish an upload as this principal's; raises as `Upload.commit`."""
        wish = Wish(by=self._by, staged=staged)
        return self._show(upload.commit(self._new(name), declared, proving=proving, wish=wish))

    def check_free(self, name: str) -> None:
        """Raise InvalidName, NameTaken or OwnerFull if an upload of `name` would be refused; before its bytes come."""
        self._store.check_name(self._new(name))

    def put_dir(
        self,
        name: str,
        folder: Path,
        *,
        proving: Proving,
        declared: Declared | None = None,
        staged: bool = False,
        once: bool = False,
    ) -> AdapterVersion:
        """Publish a folder of the server as this principal's; raises as `AdapterStore.put_dir`.

        Args:
            staged, once: as in `Wish`; PublishedMeanwhile is raised where there was one.
        """
        wish, stored = Wish(by=self._by, staged=staged, once=once), self._new(name)
        return self._show(self._store.put_dir(stored, folder, declared=declared, proving=proving, wish=wish))

    def owned_name(self, name: str) -> str:
        """Return the store's name of an adapter that this principal may change.

        Raises:
            AdapterNotFound: none that it may see. AdapterForbidden: it is shared with the principal, not its own.
        """
        stored = self._read(name, self._store.versions)[-1].name
        if not self._is_operator and not self._is_own(stored):
            raise AdapterForbidden(f"the adapter {show(name)} is shared with this tenant; only its owner may change it")
        return stored

    def metrics_name(self, ref: AdapterRef) -> str:
        """Return the name under which the operator knows an adapter that `resolve` returned."""
        stored = _stored(ref.name) if "/" in ref.name else self._new_name(ref.name)
        # a canary has series of its own
        return f"{stored}:{CANARY}" if ref.is_canary else stored

    def _read(self, name: str, read: Callable[[str], Found]) -> Found:
        """Read the principal's own adapter of that name, or one that it may see; nothing else is looked up."""
        own, foreign = self._own(name), _stored(name)
        for stored in (own, foreign if foreign != own and self._may_see(foreign) else None):
            if stored is not None:
                with suppress(AdapterNotFound):
                    return read(stored)
        raise _unknown(name)

    @property
    def _by(self) -> str:
        return f"{self.principal.tenant}/{self.principal.key_id}"

    @property
    def _is_local(self) -> bool:
        return self.principal.tenant == LOCAL_TENANT

    def _new(self, name: str) -> str:
        """Return the store's name of a new adapter: always the principal's own."""
        check_name(name, self._served_name)
        return self._new_name(name)

    def _new_name(self, bare: str) -> str:
        return bare if self._is_local else f"{self.principal.tenant}/{bare}"

    def _own(self, name: str) -> str | None:
        """Return the store's name of what would be the principal's own; None if `name` names another owner."""
        owner, slash, bare = name.partition("/")
        if not slash:
            return self._new_name(name)
        return self._new_name(bare) if owner == self.principal.tenant and "/" not in bare else None

    def _is_own(self, stored: str) -> bool:
        return stored.rpartition("/")[0] == ("" if self._is_local else self.principal.tenant)

    def _may_see(self, stored: str) -> bool:
        return self._is_operator or self._is_own(stored) or stored in self._shared_with(self.principal.tenant)

    def _may_name(self, model: str) -> bool:
        """Return whether some reading of `model` (a name, `name@...`, `name:alias`) is of a visible adapter."""
        readings = (model, model.partition("@")[0], model.rpartition(":")[0])
        return any(self._may_see(reading) for reading in readings if reading)

    def _shown(self, stored: str) -> str:
        owner, _, bare = stored.rpartition("/")
        if self._is_own(stored):
            return bare
        return f"{owner or LOCAL_TENANT}/{bare}"

    def _show(self, version: AdapterVersion) -> AdapterVersion:
        return replace(version, name=self._shown(version.name))


def _stored(name: str) -> str:
    """Return the store's name of `owner/name`, or of the operator's `name`."""
    return name.removeprefix(f"{LOCAL_TENANT}/")


def _unknown(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no adapter {ascii(name)[:140]}; GET /v1/adapters lists them", param="name")

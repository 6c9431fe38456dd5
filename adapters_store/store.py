"""The one door into the store: stage, publish, resolve, steer, open, list, delete, sweep.

Owns what names mean here and who may be removed; `publication` owns how an upload becomes a version. Invariant: nothing
reaches the registry or the objects of a store but through here.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters_store.base import BaseDims
from adapters_store.blobs import OpenAdapter
from adapters_store.canary import StickyId
from adapters_store.convert.options import Convert, ConvertOptions
from adapters_store.converter import convert_in_child
from adapters_store.entries import SiteEntry, SparseEntry
from adapters_store.errors import AdapterNotFound, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.formats import Declared
from adapters_store.manifest import Report
from adapters_store.names import owner_of
from adapters_store.pointers import Choose, Pointers, Sticky
from adapters_store.proof import NO_ENGINE, Proving
from adapters_store.publication import Publication
from adapters_store.registry import AdapterRef, AdapterVersion, Registry, find_version
from adapters_store.registry_choice import open_embedded
from adapters_store.registry_redis import SharedRegistry
from adapters_store.signatures import OpenGate
from adapters_store.steering import Actor, aliased, canaried, promoted, rolled_back, unaliased
from adapters_store.upload import Upload, Wish, copy_parts
from adapters_store.version_errors import SignatureInvalid

__all__ = [
    "AdapterRef",
    "AdapterStore",
    "AdapterVersion",
    "OpenAdapter",
    "Report",
    "SiteEntry",
    "SparseEntry",
    "Upload",
]

# inside the class, `list` is a method
Versions = list[AdapterVersion]


class AdapterStore(Publication):
    """Adapters of one base in one folder. Thread-safe; several processes may have the same folder open."""

    @classmethod
    def open(
        cls,
        root: Path,
        base: BaseDims,
        *,
        base_dir: Path | None = None,
        served_name: str = "",
        max_rank: int = 256,
        max_product_rank: int = 0,
        dense_budget_bytes: int = 0,
        max_upload_bytes: int = 2 << 30,
        image_dtype: str = "bfloat16",
        registry: Registry | None = None,
        files: FileSystem | None = None,
        convert: Convert = convert_in_child,
        clock: Callable[[], float] = time.time,
    ) -> "AdapterStore":
        """Open or create the store in `root`, and sweep what dead processes left there.

        Args:
            base: the base that new adapters are for; `resolve` and `list` show adapters of bases of its shape.
            base_dir: folder of its weights, which checkpoints of whole models are compared with.
            served_name: the base's name in the API: no adapter may take it, and `served_name:x` means adapter x.
            max_rank, max_product_rank: largest rank of a module, and of a product of ranks (LoHa) if that is larger.
            dense_budget_bytes: what one adapter may hold of dense changes of whole matrices.
            image_dtype: dtype of new images, "float32", "bfloat16" or "float16": the server's serving dtype.
            registry: that of replicas which share the folder; closed with the store. None: SQLite, for one server.
            files, convert, clock: replaced by tests.
        Raises:
            StorageFailed, StoreFull: the folder cannot be used.
        """
        # the processes that read foreign files work in folders of their own
        root = root.absolute()
        with storage_errors():
            for folder in (root, root / "objects", root / "staging"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = files if files is not None else FileSystem()
        options = ConvertOptions(base=base, dtype=image_dtype, max_rank=max_rank, max_product_rank=max_product_rank)
        weights = None if base_dir is None else str(base_dir.absolute())
        options = replace(options, dense_budget_bytes=dense_budget_bytes, base_dir=weights)
        store = cls(
            root,
            options,
            registry if registry is not None else open_embedded(root),
            served_name=served_name,
            max_upload_bytes=max_upload_bytes,
            files=files,
            convert=convert,
            clock=clock,
        )
        try:
            with storage_errors():
                files.sync_dir(root)
            store.sweep()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Give back the registry's connection; open images stay valid."""
        self._registry.close()

    @property
    def shared(self) -> SharedRegistry | None:
        """Return the registry that replicas share, if this store has one."""
        return self._registry if isinstance(self._registry, SharedRegistry) else None

    def put_dir(
        self,
        name: str,
        folder: Path,
        *,
        trusted: bool = False,
        declared: Declared | None = None,
        proving: Proving = NO_ENGINE,
        wish: Wish | None = None,
    ) -> AdapterVersion:
        """Publish a folder in one of the external formats as the next version of `name`; other files are not read.

        Args:
            trusted: the folder is the operator's own: links are followed (the Hugging Face cache is made of them).
                Otherwise every file must be a regular one with a single name.
            declared, proving, wish: as `Upload.commit`.
        Raises:
            StoreError: as `Upload.commit`.
        """
        self.check_name(name)
        declared = declared if declared is not None else Declared()
        with self.stage() as upload:
            copy_parts(folder, upload, declared, trusted=trusted)
            return upload.commit(name, declared, proving=proving, wish=wish)

    def resolve(self, model: str, sticky: StickyId | None = None) -> AdapterRef | None:
        """Return what `model` stands for; None if no adapter of this base is meant. An exact name always wins.

        Args:
            sticky: whose request it is, which decides who gets a canary; None: nobody.
        """
        found = self._find(model, sticky)
        prefix = f"{self._served_name}:"
        if found is None and self._served_name and model.startswith(prefix):
            found = self._find(model.removeprefix(prefix), sticky)
        if found is None:
            return None
        return AdapterRef.of(found, is_canary=self._registry.canary(found.name) == found.version)

    def check_promotion(self, ref: AdapterRef) -> None:
        """Check a version's signature again, before its image is brought to a faster tier or used.

        Args:
            ref: what `resolve` returned.
        Raises:
            SignatureInvalid: this server does not serve it. AdapterNotFound: it was deleted meanwhile.
        """
        if not isinstance(self.signatures, OpenGate):
            self._check_signature(self._version(ref.name, ref.version))

    def check_digest(self, digest: str) -> None:
        """Check that some version of this digest may be served here.

        Raises:
            AdapterNotFound: no version of this base has it. SignatureInvalid: this server serves none that does.
        """
        refused: SignatureInvalid | None = None
        for current in self.list():
            for version in self._registry.versions(current.name):
                if version.digest == digest:
                    try:
                        return self._check_signature(version)
                    except SignatureInvalid as error:
                        refused = error
        raise refused or AdapterNotFound(f"no version of an adapter has the digest sha256:{digest}", param="name")

    def list(self) -> Versions:
        """Return the current version of every adapter of this base, by name."""
        return [version for version in self._registry.all_current() if self._is_ours(version)]

    def get(self, name: str) -> AdapterVersion:
        """Return the current version of `name`; raises AdapterNotFound."""
        found = self._registry.current(name)
        if found is None or not self._is_ours(found):
            raise AdapterNotFound(f"there is no adapter {ascii(name)[:140]}; GET /v1/adapters lists them", param="name")
        return found

    def versions(self, name: str) -> Versions:
        """Return all versions of `name`, oldest first; raises AdapterNotFound."""
        self.get(name)
        return self._registry.versions(name)

    def pointers(self, name: str) -> Pointers:
        """Return where `name` points and how it came to that; raises AdapterNotFound."""
        self.get(name)
        return self._registry.pointers(name) or Pointers()

    def promote(self, name: str, version: int | str, alias: str | None = None, *, by: str = "") -> AdapterVersion:
        """Let `name`, or `name:alias`, mean a version from now on; running requests finish on theirs.

        Args:
            version: its number, or an alias of it ("canary"). Promoting the canary to the plain name ends the canary.
        Raises:
            AdapterNotFound, InvalidName, NameTaken.
        """
        self.get(name)
        pointers = self._registry.move(name, promoted(self._actor(by), version, alias))
        return self._version(name, pointers.current if alias is None else pointers.aliases[alias])

    def rollback(self, name: str, *, by: str = "") -> AdapterVersion:
        """Let `name` mean what it meant before, step by step; raises AdapterNotFound, NothingBefore."""
        self.get(name)
        return self._version(name, self._registry.move(name, rolled_back(self._actor(by))).current)

    def set_canary(
        self, name: str, version: int | str, percent: float, *, sticky: Sticky = Sticky.USER, by: str = ""
    ) -> Pointers:
        """Give a version a share of `name`'s requests, always the same users' ones; `name:canary` means it.

        Raises:
            AdapterNotFound, NameTaken. InvalidOption: no percentage, or the version that `name` means anyway.
        """
        self.get(name)
        return self._registry.move(name, canaried(self._actor(by), version, percent, sticky))

    def set_alias(self, name: str, alias: str, version: int, *, by: str = "") -> None:
        """Let `name:alias` mean that version; raises InvalidName, NameTaken, AdapterNotFound."""
        self.get(name)
        self._registry.move(name, aliased(self._actor(by), alias, version))

    def remove_alias(self, name: str, alias: str, *, by: str = "") -> Pointers:
        """Forget `name:alias`; the alias `canary` goes with its share. Raises AdapterNotFound."""
        self.get(name)
        return self._registry.move(name, unaliased(self._actor(by), alias))

    def retire(self, name: str, choose: Choose) -> Versions:
        """Forget the versions that `choose` (`steering.removable`, `older_than`) names; raises what it raises.

        Their bytes stay for an hour, and open images for as long as they are held, so accepted requests finish.
        """
        self.get(name)
        with self._lock.held():
            return self._registry.retire(name, choose, now=int(self._clock()))

    def delete(self, name: str) -> None:
        """Forget `name` with all versions and aliases; raises AdapterNotFound.

        The bytes stay for an hour, and open images for as long as they are held, so accepted requests finish.
        """
        self.get(name)
        with self._lock.held():
            self._registry.delete(name, now=int(self._clock()))

    def verify(self, name: str) -> None:
        """Hash every byte of every version of `name` again; raises AdapterCorrupt, AdapterNotFound."""
        for version in self.versions(name):
            self.open_image(version.digest)

    def _find(self, model: str, sticky: StickyId | None) -> AdapterVersion | None:
        found = find_version(self._registry, model, sticky)
        return found if found is not None and self._is_ours(found) else None

    def _check_signature(self, version: AdapterVersion) -> None:
        self.signatures.check_promotion(version)
        # the engine checks it again; what a replica or an older release published has none here yet
        self.seals.keep(version.digest, owner_of(version.name), version.signature)

    def _actor(self, by: str) -> Actor:
        return Actor(by, int(self._clock()))

    def _version(self, name: str, number: int) -> AdapterVersion:
        found = self._registry.version(name, number)
        if found is None:
            raise AdapterNotFound(f"the adapter {ascii(name)[:140]} was deleted meanwhile", param="name")
        return found

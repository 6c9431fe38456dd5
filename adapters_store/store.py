"""The one door into the store: stage, publish, resolve, open, list, delete, sweep.

Owns the order of the commit protocol and the lock that keeps publishing, deleting and sweeping of all processes apart.
Invariant: a name points only to an object that is whole and durable; what is acknowledged is never lost, and what is
not acknowledged leaves no trace after the next sweep.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapters_store.base import BaseDims
from adapters_store.blobs import Blobs, OpenAdapter, open_image
from adapters_store.canonical import check_adapter
from adapters_store.convert.options import Convert, ConvertOptions
from adapters_store.converter import convert_in_child
from adapters_store.entries import SiteEntry, SparseEntry
from adapters_store.errors import AdapterNotFound, NameTaken, StoreError, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.formats import Declared
from adapters_store.locks import StoreLock
from adapters_store.manifest import Manifest, Report
from adapters_store.names import check_alias, check_stored_name
from adapters_store.proof import NO_ENGINE, NotProbed, Probe, Proof, Proving, Staged
from adapters_store.quotas import OwnerQuota, check_quota
from adapters_store.registry import (
    AdapterRef,
    AdapterVersion,
    BaseFacts,
    NewVersion,
    Registry,
    base_facts,
    find_version,
    fits,
)
from adapters_store.registry_choice import open_embedded
from adapters_store.staging import Staging, hold
from adapters_store.upload import Upload, copy_parts

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

# a deleted adapter's bytes stay this long for requests that were already accepted under its digest
_GRACE_S = 3600.0
# inside the class, `list` is a method
Versions = list[AdapterVersion]


class AdapterStore:
    """Adapters of one base in one folder. Thread-safe; several processes may have the same folder open."""

    def __init__(
        self,
        root: Path,
        options: ConvertOptions,
        registry: Registry,
        *,
        served_name: str,
        max_upload_bytes: int,
        files: FileSystem,
        convert: Convert,
        clock: Callable[[], float],
    ) -> None:
        self._options = options
        self._registry = registry
        self._served_name = served_name
        self._max_upload_bytes = max_upload_bytes
        # what one owner may hold in all; set by whoever starts the server, before the first upload
        self.quota = OwnerQuota()
        self._files = files
        self._convert = convert
        self._clock = clock
        self._lock = StoreLock(root / "lock")
        self._staging = Staging(root / "staging", files)
        self._blobs = Blobs(root / "objects", files)
        self._base_facts: BaseFacts = options.base.to_dict()

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
        with storage_errors():
            for folder in (root, root / "objects", root / "staging"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = files if files is not None else FileSystem()
        options = ConvertOptions(base=base, dtype=image_dtype, max_rank=max_rank, max_product_rank=max_product_rank)
        options = replace(options, dense_budget_bytes=dense_budget_bytes, base_dir=str(base_dir) if base_dir else None)
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

    def check_name(self, name: str) -> None:
        """Raise InvalidName, NameTaken or OwnerFull if an upload of `name` would be refused before its bytes come."""
        check_stored_name(name, self._served_name)
        self._registry.check_free(name)
        current = self._registry.current(name)
        if current is not None and not self._is_ours(current):
            raise NameTaken(f"'{name}' is an adapter of another base in this store; choose another name", param="name")
        check_quota(self._registry, self.quota, name, 0)

    def stage(self) -> Upload:
        """Begin an upload; use it as a context manager."""
        with self._lock.held():
            return Upload(self._staging.root, self._files, max_bytes=self._max_upload_bytes, publish=self._commit)

    def put_dir(
        self,
        name: str,
        folder: Path,
        *,
        trusted: bool = False,
        declared: Declared | None = None,
        proving: Proving = NO_ENGINE,
    ) -> AdapterVersion:
        """Publish a folder in one of the external formats as the next version of `name`; other files are not read.

        Args:
            trusted: the folder is the operator's own: links are followed (the Hugging Face cache is made of them).
                Otherwise every file must be a regular one with a single name.
            declared, proving: as `Upload.commit`.
        Raises:
            StoreError: as `Upload.commit`.
        """
        self.check_name(name)
        declared = declared if declared is not None else Declared()
        with self.stage() as upload:
            copy_parts(folder, upload, declared, trusted=trusted)
            return upload.commit(name, declared, proving=proving)

    def resolve(self, model: str) -> AdapterRef | None:
        """Return what `model` stands for; None if no adapter of this base is meant. An exact name always wins."""
        found = self._find(model)
        prefix = f"{self._served_name}:"
        if found is None and self._served_name and model.startswith(prefix):
            found = self._find(model.removeprefix(prefix))
        return None if found is None else AdapterRef.of(found)

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

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Let `name:alias` mean that version; raises InvalidName, NameTaken, AdapterNotFound."""
        check_alias(alias)
        self.get(name)
        self._registry.set_alias(name, alias, version)

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

    def open_image(self, digest: str) -> OpenAdapter:
        """Map an adapter's verified image; raises AdapterCorrupt, or AdapterNotFound for another base's adapter."""
        image = open_image(self._blobs.root, digest)
        if not fits(base_facts(image.base, is_base_dependent=image.base_dependent), self._base_facts):
            raise AdapterNotFound(f"adapter {digest[:12]} is for a base of other dimensions or weights")
        return image

    def sweep(self) -> None:
        """Remove staging folders whose owner died, and objects that no version points to.

        Deleted adapters' objects stay for an hour: requests that were accepted under their digest may still load them.
        """
        with self._lock.held(), storage_errors():
            self._staging.sweep()
            for digest in sorted(self._blobs.digests() - self._needed()):
                self._blobs.remove(digest)

    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        self.check_name(name)
        options = replace(self._options, declared=declared)
        self._convert(upload.source, upload.object, options)
        limits = (options.largest_rank, options.dense_budget_bytes)
        with storage_errors():
            manifest = check_adapter(upload.object, options.base, options.dtype, *limits)
            self._blobs.make_durable(upload.object)
        new = NewVersion.of(name, manifest, created=int(self._clock()))
        self.sweep()
        try:
            if isinstance(upload.proving, NotProbed):
                new = replace(new, not_probed=upload.proving.reason)
            else:
                new = replace(new, proof=self._prove(upload, upload.proving, manifest, options))
            with self._lock.held():
                with storage_errors():
                    if new.proof is None:
                        self._blobs.publish(upload.object, new.digest)
                self.check_name(name)
                check_quota(self._registry, self.quota, name, new.num_bytes)
                return self._registry.publish(new)
        except BaseException:
            self._abandon(upload, new.digest)
            raise

    def _prove(self, upload: Upload, probe: Probe, manifest: Manifest, options: ConvertOptions) -> Proof:
        """Let an object be opened by its digest while its staging folder holds it, and have it proven."""
        digest = manifest.digest()
        with self._lock.held(), storage_errors():
            self._files.make_dir(upload.probe_folder)
            hold(upload.folder, digest, self._files)
            self._blobs.publish(upload.object, digest)
        image = partial(self.open_image, digest)
        return probe(Staged(digest, manifest, upload.source, upload.probe_folder, options, image))

    def _abandon(self, upload: Upload, digest: str) -> None:
        """Remove an object that got no pointer; if the disk fails here too, the next sweep does it."""
        with suppress(OSError, StoreError), self._lock.held():
            if digest not in self._needed(but=upload.folder):
                self._blobs.remove(digest)

    def _needed(self, *, but: Path | None = None) -> set[str]:
        """Return the digests that a version, a running request or a probe of another folder than `but` may need."""
        return self._registry.digests(retired_since=int(self._clock() - _GRACE_S)) | self._staging.held(but=but)

    def _find(self, model: str) -> AdapterVersion | None:
        found = find_version(self._registry, model)
        return found if found is not None and self._is_ours(found) else None

    def _is_ours(self, version: AdapterVersion) -> bool:
        return fits(version.base, self._base_facts)

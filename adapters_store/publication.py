"""How an upload becomes a version, and how what nobody needs goes: the order of the commit protocol.

Owns the order and the lock that keeps publishing, deleting and sweeping of all processes apart; what names mean is
`store`'s. Invariant: a name points only to an object that is whole and durable; what is acknowledged is never lost, and
what is not acknowledged leaves no trace after the next sweep.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from adapters_store.blobs import Blobs, OpenAdapter, open_image
from adapters_store.canonical import check_adapter
from adapters_store.convert.options import Convert, ConvertOptions
from adapters_store.copies import Copies
from adapters_store.errors import AdapterNotFound, NameTaken, StoreError, storage_errors
from adapters_store.file_system import FileSystem
from adapters_store.formats import Declared
from adapters_store.locks import StoreLock
from adapters_store.made_by import keep_provenance
from adapters_store.manifest import Manifest
from adapters_store.names import check_stored_name, owner_of
from adapters_store.proof import NotProbed, Probe, Proof, Staged
from adapters_store.quotas import OwnerQuota, check_quota
from adapters_store.registry import AdapterVersion, BaseFacts, Held, NewVersion, Registry, base_facts, fits
from adapters_store.seals import Seals
from adapters_store.signatures import OpenGate, SignatureGate
from adapters_store.staging import Staging, hold
from adapters_store.steering import older_than
from adapters_store.upload import Upload, Wish
from adapters_store.version_errors import PublishedMeanwhile

# a retired version's bytes stay this long for requests that were already accepted under its digest
GRACE_S = 3600.0


class Publication:
    """The commit protocol of one store. Thread-safe; several processes may run it over the same folder."""

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
        # how many of a name's versions stay beside those that something points to; None: all
        self.keep_versions: int | None = None
        # where the objects lie if not in the folder, which then holds copies; set likewise
        self.copies: Copies | None = None
        # decides about signatures; set likewise
        self.signatures: SignatureGate = OpenGate()
        self._files = files
        self._convert = convert
        self._clock = clock
        self._lock = StoreLock(root / "lock")
        self.seals = Seals(root, files)
        self._staging = Staging(root / "staging", files)
        self._blobs = Blobs(root / "objects", files)
        self._base_facts: BaseFacts = options.base.to_dict()

    def check_name(self, name: str) -> None:
        """Raise InvalidName, NameTaken or OwnerFull if an upload of `name` would be refused before its bytes come."""
        check_stored_name(name, self._served_name)
        self._registry.check_free(name)
        current = self._registry.current(name)
        if current is not None and not self._is_ours(current):
            raise NameTaken(f"'{name}' is an adapter of another base in this store; choose another name", param="name")
        check_quota(self.quota, name, 0, self._registry)

    def stage(self) -> Upload:
        """Begin an upload; use it as a context manager."""
        with self._lock.held():
            return Upload(self._staging.root, self._files, max_bytes=self._max_upload_bytes, publish=self._commit)

    def open_image(self, digest: str) -> OpenAdapter:
        """Map an adapter's verified image; raises AdapterCorrupt, or AdapterNotFound for another base's adapter."""
        image = open_image(self._blobs.root, digest) if self.copies is None else self.copies.open(digest)
        if not fits(base_facts(image.base, is_base_dependent=image.base_dependent), self._base_facts):
            raise AdapterNotFound(f"adapter {digest[:12]} is for a base of other dimensions or weights")
        return image

    def bring(self, digest: str) -> None:
        """See that an object's files lie in this folder; raises AdapterCorrupt, StoreAway."""
        if self.copies is not None:
            self.copies.bring(digest)

    def sweep(self) -> None:
        """Remove staging folders whose owner died, and objects that no version points to.

        Retired versions' objects stay for an hour: requests that were accepted under their digest may still load them.
        """
        with self._lock.held(), storage_errors():
            self._staging.sweep()
            needed = self._needed()
            for digest in sorted(self._blobs.digests() - needed):
                self._blobs.remove(digest)
            self.seals.sweep(needed)

    def _commit(self, upload: Upload, name: str, declared: Declared) -> AdapterVersion:
        self.check_name(name)
        signature = self.signatures.check_upload(owner_of(name), upload.sent())
        made_by = upload.provenance()
        options = replace(self._options, declared=declared)
        self._convert(upload.source, upload.object, options)
        limits = (options.largest_rank, options.dense_budget_bytes)
        with storage_errors():
            manifest = check_adapter(upload.object, options.base, options.dtype, *limits)
            if made_by:
                manifest = keep_provenance(upload.object, manifest, made_by, self._files)
            self._blobs.make_durable(upload.object)
        new = NewVersion.of(name, manifest, created=int(self._clock()))
        new = replace(new, by=upload.wish.by, staged=upload.wish.staged, signature=signature)
        self.sweep()
        # before the probe, whose engine checks it
        self.seals.keep(new.digest, owner_of(name), signature)
        try:
            if isinstance(upload.proving, NotProbed):
                new = replace(new, not_probed=upload.proving.reason)
            else:
                new = replace(new, proof=self._prove(upload, upload.proving, manifest, options))
            if self.copies is not None:
                # before the name: a version that some replica knows can be fetched by all
                self.copies.share(upload.object if new.proof is None else self._blobs.root / new.digest, new.digest)
            with self._lock.held():
                with storage_errors():
                    if new.proof is None:
                        self._blobs.publish(upload.object, new.digest)
                self.check_name(name)
                version = self._registry.publish(new, check=partial(self._check_new, new, upload.wish))
        except BaseException:
            self._abandon(upload, new.digest)
            raise
        self._retire_old(name)
        return version

    def _check_new(self, new: NewVersion, wish: Wish, held: Held) -> None:
        """Decide with nothing else changing; raises PublishedMeanwhile, OwnerFull."""
        if wish.once and any(version.digest == new.digest for version in held.versions(new.name)):
            raise PublishedMeanwhile(f"'{new.name}' has a version of these bytes already")
        check_quota(self.quota, new.name, new.num_bytes, held)

    def _retire_old(self, name: str) -> None:
        if self.keep_versions is not None:
            # what is published stays so; versions that could not be forgotten now are when the next one comes
            with suppress(StoreError), self._lock.held():
                self._registry.retire(name, older_than(self.keep_versions), now=int(self._clock()))

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
        return self._registry.digests(retired_since=int(self._clock() - GRACE_S)) | self._staging.held(but=but)

    def _is_ours(self, version: AdapterVersion) -> bool:
        return fits(version.base, self._base_facts)

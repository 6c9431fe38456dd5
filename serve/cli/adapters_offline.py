"""The adapter commands on a store's folder, with no server: the same door (`AdapterStore`) that the server uses.

Owns how the base is found: given by the operator for the first adapter, afterwards read from the adapters that are
there. Invariant: nothing is created in a folder that is no store, except by `add`.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from adapters_store.base import BaseDims
from adapters_store.errors import AdapterNotFound
from adapters_store.formats import Declared
from adapters_store.proof import NotProbed, Proving
from adapters_store.registry import AdapterVersion, Registry, base_dims
from adapters_store.registry_choice import kinds_of, open_embedded
from adapters_store.registry_redis import SharedRegistry
from adapters_store.signatures import SignatureGate, shown
from adapters_store.store import AdapterStore
from adapters_store.upload import Wish
from serve.cli.adapter_rows import AdapterRow
from serve.cli.offline_audit import operator, record
from serve.cli.offline_probe import probe_offline
from serve.errors import StartError
from serve.model.download import resolve_model_dir
from serve.model.spec import read_spec
from serve.tenants.audit import AuditEvent
from serve.tenants.principal import LOCAL_TENANT

# the operator's own folder: a checkpoint of a whole model is as large as the base
_MAX_FOLDER_BYTES = 1 << 40


def add(
    root: Path,
    name: str,
    folder: Path,
    *,
    base: str | None,
    dtype: str,
    declared: Declared | None = None,
    dense_budget_bytes: int = 0,
    is_probed: bool = True,
    promotes: bool = True,
    gate: SignatureGate | None = None,
) -> AdapterRow:
    """Publish a folder as the next version of `name`.

    Args:
        base: the base model's folder or id; None takes the base of the adapters that the store already holds.
        declared: what the folder holds; nothing: found by the names of its files.
        dtype: of the image; "auto" takes the base's own, or that of the adapters already there.
        dense_budget_bytes: what the adapter may hold of dense changes.
        is_probed: run it on the base before it is published, which needs `base`.
        gate: decides about its signature; nothing: none is asked for.
        promotes: the name means it from then on; else only if it means nothing yet.
    Raises:
        StartError: the base is not known, or does not start. StoreError, ServeError: the adapter is refused.
    """
    if not folder.is_dir():
        raise StartError(f"{folder}: no such folder; an adapter is a PEFT folder with adapter_config.json")
    check_not_shared(root)
    base_dir = None if base is None else resolve_model_dir(base)
    dims, own_dtype = _known_base(root) if base_dir is None else _read_base(base_dir)
    image_dtype = own_dtype if dtype == "auto" else dtype
    opened = AdapterStore.open(
        root,
        dims,
        base_dir=base_dir,
        image_dtype=image_dtype,
        max_upload_bytes=_MAX_FOLDER_BYTES,
        dense_budget_bytes=dense_budget_bytes,
    )
    proving = _proving(base_dir, root, image_dtype, is_probed=is_probed)
    with closing(opened) as store:
        store.signatures = gate if gate is not None else store.signatures
        wish = Wish(by=f"{LOCAL_TENANT}/{operator()}", staged=not promotes)
        version = store.put_dir(name, folder, trusted=True, declared=declared, proving=proving, wish=wish)
        record(root, AuditEvent.UPLOAD, name, f"version {version.version} sha256:{version.digest}")
        return row_of(version)


def rows(root: Path) -> list[AdapterRow]:
    """Return the current version of every adapter in the store, of all bases."""
    with open_registry(root) as registry:
        return [row_of(version) for version in registry.all_current()]


def versions(root: Path, name: str) -> list[AdapterRow]:
    """Return all versions of one adapter, oldest first; raises AdapterNotFound."""
    with store_of(root, name) as store:
        return [row_of(version) for version in store.versions(name)]


def remove(root: Path, name: str) -> None:
    """Forget an adapter with all its versions; raises AdapterNotFound, StartError if replicas share the store."""
    check_not_shared(root)
    with store_of(root, name) as store:
        store.delete(name)
    record(root, AuditEvent.DELETE, name)


def verify(root: Path, name: str) -> None:
    """Hash every byte of every version again; raises AdapterCorrupt, AdapterNotFound."""
    with store_of(root, name) as store:
        store.verify(name)


def row_of(version: AdapterVersion) -> AdapterRow:
    """Return a version under the API's field names."""
    report = version.report
    return AdapterRow(
        name=version.name,
        version=version.version,
        digest=f"sha256:{version.digest}",
        family=version.family,
        rank=version.rank,
        bytes=version.num_bytes,
        created=version.created,
        dtype=version.dtype,
        base=version.base,
        num_virtual_tokens=version.num_virtual_tokens,
        invocation_tokens=[*version.invocation_tokens],
        report={key: [*modules] for key, modules in asdict(report).items()},
        proof=version.proof,
        not_probed=version.not_probed if version.proof is None else None,
        signature=shown(version.signature),
        provenance=version.provenance,
    )


def _proving(base_dir: Path | None, root: Path, dtype: str, *, is_probed: bool) -> Proving:
    if not is_probed:
        return NotProbed("added with --probe off")
    if base_dir is None:
        return NotProbed("added without --base, so the base's weights were not at hand to run it on")
    return partial(probe_offline, base_dir, root, dtype)


def _read_base(base_dir: Path) -> tuple[BaseDims, str]:
    spec = read_spec(base_dir)
    return spec.dims, spec.dtype


def _known_base(root: Path) -> tuple[BaseDims, str]:
    known = {}
    if kinds_of(root):
        with open_registry(root) as registry:
            known = {base_dims(version.base): version.dtype for version in registry.all_current()}
    if len(known) != 1:
        raise StartError(
            f"the store in {root} holds adapters of {len(known)} bases; say which one this is for: --base MODEL_DIR"
        )
    return next(iter(known.items()))


@contextmanager
def store_of(root: Path, name: str) -> Iterator[AdapterStore]:
    """Open the store as the server of this adapter's base sees it."""
    with open_registry(root) as registry:
        version = registry.current(name)
    if version is None:
        raise AdapterNotFound(
            f"there is no adapter {ascii(name)[:140]} in this store; `chorale adapters list` shows all"
        )
    shared = SharedRegistry.open(root) if kinds_of(root) == ["journal"] else None
    base = base_dims(version.base)
    with closing(AdapterStore.open(root, base, image_dtype=version.dtype, registry=shared)) as store:
        yield store


@contextmanager
def open_registry(root: Path) -> Iterator[Registry]:
    kinds = kinds_of(root)
    if not kinds:
        raise StartError(f"{root} is not an adapter store; `chorale adapters add` or `chorale serve` makes one")
    # what replicas share can be read here; changes go through one of them, who tells the others
    with closing(SharedRegistry.open(root) if kinds == ["journal"] else open_embedded(root)) as registry:
        yield registry


def check_not_shared(root: Path) -> None:
    if kinds_of(root) == ["journal"]:
        raise StartError(f"the store in {root} is shared by replicas; change it through one of them: --url URL")

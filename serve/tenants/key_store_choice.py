"""Which key store a folder has: SQLite for one server, or the journal that replicas share.

Owns the rule and the way from one to the other. Invariants: keys lie in one of the two, and what is there decides; a
store that came to be shared keeps all its keys, and the file that held them is renamed, never removed.
"""

from contextlib import closing
from pathlib import Path

from adapters_store.blob_choice import open_journal
from adapters_store.change_log import ChangeLog
from adapters_store.errors import StoreError
from adapters_store.journal import Journal, LinkingFileSystem
from adapters_store.locks import StoreLock
from adapters_store.registry_choice import kinds_of, put_aside
from serve.errors import StartError, Unavailable
from serve.tenants.key_changes import KeyChange
from serve.tenants.key_store import KeyStore
from serve.tenants.key_store_journal import KEY_JOURNAL, JournalKeyStore
from serve.tenants.key_store_sqlite import KEYS_FILE, SqliteKeyStore


def holds_keys(root: Path) -> bool:
    """Return whether keys were ever made in this folder."""
    return (root / KEYS_FILE).is_file() or (root / KEY_JOURNAL).is_dir()


def open_key_store(root: Path, pepper: bytes, *, journal: ChangeLog | None = None) -> KeyStore:
    """Open or make the keys of a store.

    Args:
        journal: where they lie if not in the folder.
    Raises:
        StartError: they were made with another pepper, or both kinds hold keys. Unavailable: they cannot be read.
    """
    if journal is None and not (root / KEY_JOURNAL).is_dir() and "journal" not in kinds_of(root):
        return SqliteKeyStore(root / KEYS_FILE, pepper)
    try:
        place = journal if journal is not None else Journal(root / KEY_JOURNAL, LinkingFileSystem())
        # one at a time takes over: whoever opens a SQLite file that is being renamed makes an empty one in its place
        with StoreLock(root / "lock").held():
            keys = JournalKeyStore(place, pepper, begin=lambda: _kept(root, pepper))
            if (root / KEYS_FILE).is_file():
                _put_aside(root, pepper, keys)
    except StoreError as error:
        raise Unavailable(error.message, code="key_store_unavailable") from error
    return keys


def key_journal(blobs_url: str | None) -> ChangeLog | None:
    """Return where keys lie if not in the folder; raises StoreError."""
    return None if blobs_url is None else open_journal(blobs_url, KEY_JOURNAL)


def _kept(root: Path, pepper: bytes) -> KeyChange:
    """Return what SQLite holds, as one change."""
    if not (root / KEYS_FILE).is_file():
        return KeyChange()
    with closing(SqliteKeyStore(root / KEYS_FILE, pepper)) as old:
        snapshot = old.snapshot()
    return KeyChange(records=snapshot.records, granted=snapshot.grants)


def _put_aside(root: Path, pepper: bytes, keys: KeyStore) -> None:
    known = {record.key_id for record in keys.snapshot().records}
    if unknown := {record.key_id for record in _kept(root, pepper).records} - known:
        raise StartError(
            f"{KEYS_FILE} holds the key {min(unknown)}, which {KEY_JOURNAL}/ lacks; move aside the one that is wrong"
        )
    put_aside(root / KEYS_FILE)

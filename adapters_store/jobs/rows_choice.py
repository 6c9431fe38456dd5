"""Where a store's jobs and data files are kept: SQLite for one server, or the journal that replicas share.

Owns the rule and the way from one to the other. Invariants: jobs lie in one of them, and what is there decides; a
folder that came to be shared keeps all its jobs, and the file that held them is renamed, never removed; one whose
server came to share an object store holds none of its own, or that server does not start.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from adapters_store.blob_choice import open_journal, open_objects
from adapters_store.errors import InvalidOption, storage_errors
from adapters_store.jobs.database import TRAINING_FILE, TrainingDatabase, TrainingRows
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.row_changes import RowChanges, all_rows
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.journal import Journal, LinkingFileSystem
from adapters_store.locks import StoreLock
from adapters_store.registry_choice import kinds_of, put_aside

TRAINING_JOURNAL = Path("training") / "journal"


def is_store(root: Path) -> bool:
    """Return whether a server, or a command, has made a store of this folder."""
    return bool(kinds_of(root)) or (root / TRAINING_FILE).is_file() or (root / TRAINING_JOURNAL).is_dir()


def open_rows(root: Path, clock: Callable[[], float], blobs_url: str | None = None) -> TrainingRows:
    """Open or make the jobs of a store, of the kind that its registry has.

    Args:
        blobs_url: the object store that holds them; None: the folder does.
    Raises:
        InvalidOption: both kinds hold jobs, and differ. StorageFailed, StoreFull: they cannot be read or written.
        StoreAway: the object store does not answer.
    """
    if blobs_url is not None:
        _check_none_here(root, clock)
        return SharedRows(open_journal(blobs_url, TRAINING_JOURNAL.as_posix()), clock)
    if "journal" not in kinds_of(root) and not (root / TRAINING_JOURNAL).is_dir():
        return TrainingDatabase(root, clock)
    with storage_errors():
        (root / TRAINING_JOURNAL.parent).mkdir(mode=0o700, parents=True, exist_ok=True)
    # one at a time takes over: whoever opens a SQLite file that is being renamed makes an empty one in its place
    with StoreLock(root / "lock").held():
        journal = Journal(root / TRAINING_JOURNAL, LinkingFileSystem())
        rows = SharedRows(journal, clock, begin=lambda: _kept(root, clock))
        try:
            if (root / TRAINING_FILE).is_file():
                _put_aside(root, clock, rows)
        except BaseException:
            rows.close()
            raise
    return rows


def open_folders(root: Path, blobs_url: str | None = None) -> TrainingFolders:
    """Open or make the files of a store's jobs; the caller closes them. Raises InvalidOption, StorageFailed."""
    if blobs_url is None:
        return TrainingFolders(root)
    objects = open_objects(blobs_url)
    # behind the check: it needs the object store's client
    from adapters_store.jobs.shared_folders import SharedFolders  # noqa: PLC0415

    return SharedFolders(root, objects)


def _check_none_here(root: Path, clock: Callable[[], float]) -> None:
    """Raise InvalidOption if a folder for copies holds jobs of its own; an empty file of them is put aside."""
    if (root / TRAINING_JOURNAL).is_dir():
        raise InvalidOption(
            f"this folder holds a shared store's training jobs ({TRAINING_JOURNAL}/); with an object store, choose "
            "another folder, which will hold copies alone",
            param="store",
        )
    if not (root / TRAINING_FILE).is_file():
        return
    with StoreLock(root / "lock").held():
        with closing(TrainingDatabase(root, clock)) as old, old.read() as db:
            ids = _ids(db)
        if ids:
            raise InvalidOption(
                f"{TRAINING_FILE} holds {min(ids)}, and with an object store jobs and data files lie there: upload the "
                f"data again, make unfinished jobs again, and move {TRAINING_FILE} aside; what was trained stays",
                param="store",
            )
        put_aside(root / TRAINING_FILE)


def _kept(root: Path, clock: Callable[[], float]) -> RowChanges:
    """Return what SQLite holds, as one change."""
    if not (root / TRAINING_FILE).is_file():
        return RowChanges({}, is_everything=True)
    with closing(TrainingDatabase(root, clock)) as old, old.read() as db:
        return all_rows(db)


def _put_aside(root: Path, clock: Callable[[], float], rows: TrainingRows) -> None:
    with rows.read() as db:
        known = _ids(db)
    with closing(TrainingDatabase(root, clock)) as old, old.read() as db:
        unknown = _ids(db) - known
    if unknown:
        raise InvalidOption(
            f"{TRAINING_FILE} holds {min(unknown)}, which {TRAINING_JOURNAL}/ lacks; move aside the one that is wrong",
            param="store",
        )
    put_aside(root / TRAINING_FILE)


def _ids(db: sqlite3.Connection) -> set[str]:
    return {row["id"] for name in ("jobs", "files") for row in db.execute(f"SELECT id FROM {name}").fetchall()}

"""Where a store's jobs and data files are kept: SQLite for one server, or the journal that replicas share.

Owns the rule and the way from one to the other. Invariants: jobs lie in one of the two, and what is there decides; a
store that came to be shared keeps all its jobs, and the file that held them is renamed, never removed.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from adapters_store.errors import InvalidOption, storage_errors
from adapters_store.jobs.database import TRAINING_FILE, TrainingDatabase, TrainingRows
from adapters_store.jobs.row_changes import RowChanges, all_rows
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.journal import Journal, LinkingFileSystem
from adapters_store.locks import StoreLock
from adapters_store.registry_choice import kinds_of, put_aside

TRAINING_JOURNAL = Path("training") / "journal"


def is_store(root: Path) -> bool:
    """Return whether a server, or a command, has made a store of this folder."""
    return bool(kinds_of(root)) or (root / TRAINING_FILE).is_file() or (root / TRAINING_JOURNAL).is_dir()


def open_rows(root: Path, clock: Callable[[], float]) -> TrainingRows:
    """Open or make the jobs of a store, of the kind that its registry has.

    Raises:
        InvalidOption: both kinds hold jobs, and differ. StorageFailed, StoreFull: they cannot be read or written.
    """
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

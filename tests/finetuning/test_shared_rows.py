"""Jobs that replicas share: a journal that is folded, damaged, cut short, and taken over from one server's file."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters_store.errors import InvalidOption, StorageFailed, StoreAway, StoreFull
from adapters_store.jobs import shared_rows
from adapters_store.jobs.database import TRAINING_FILE, TrainingDatabase
from adapters_store.jobs.job import JobState, NewEvent
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.queue_sqlite import SqliteJobQueue
from adapters_store.jobs.row_changes import RowChanges, RowEntry, write_entry
from adapters_store.jobs.rows_choice import TRAINING_JOURNAL, is_store, open_rows
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.journal import NOTHING_BEFORE, Journal, LinkingFileSystem
from adapters_store.registry_redis import SharedRegistry
from serve.trainer.starting import wait_for_store
from tests.finetuning.training_store import BASE, FOLD_ENTRIES, LEASE_S, Clock, TrainingStore, new_job


@pytest.fixture(params=["journal", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainingStore]:
    """Return an empty store of jobs that replicas share, in a folder or in an object store."""
    with closing(TrainingStore(tmp_path, kind=request.param)) as store:
        yield store


@pytest.fixture(params=["journal", "objects"])
def hasty_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainingStore]:
    """Return one in which a fold removes at once what it makes needless, for tests with one writer at a time."""
    with closing(TrainingStore(tmp_path, kind=request.param, kept_s=0.0)) as store:
        yield store


def entries(root: Path) -> list[Path]:
    """Return the journal's numbered files, in order."""
    return sorted(path for path in (root / "journal").iterdir() if path.name.isdecimal())


def replica(root: Path, *, fold_entries: int = 1000) -> SharedRows:
    """Return one more view of a store's journal."""
    return SharedRows(Journal(root / "journal", LinkingFileSystem()), Clock(), fold_entries=fold_entries)


class FailingJournal(Journal):
    """A journal whose next appends fail, before or after the entry was written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, LinkingFileSystem())
        self.fails: list[str] = []

    def append(self, number: int, payload: bytes) -> bool:
        """Write, unless it is to fail."""
        kind = self.fails.pop(0) if self.fails else ""
        if kind == "before":
            raise StoreFull("no room")
        found = super().append(number, payload)
        if kind == "after":
            raise StorageFailed("the disk failed")
        return found


def test_a_change_that_could_not_be_written_is_none_and_one_that_was_written_after_all_is_found(tmp_path: Path) -> None:
    journal = FailingJournal(tmp_path / "journal")
    with closing(SharedRows(journal, Clock())) as rows:
        jobs = SqliteJobs(rows)
        journal.fails = ["before"]
        with pytest.raises(StoreFull):
            jobs.create(new_job())
        assert jobs.page(None).items == ()
        journal.fails = ["after"]
        with pytest.raises(StorageFailed):
            jobs.create(new_job())
        (kept,) = jobs.page(None).items
        again = jobs.create(new_job())
        with closing(replica(tmp_path)) as other:
            assert {job.id for job in SqliteJobs(other).page(None).items} == {kept.id, again.id}


def test_a_block_that_raises_leaves_nothing_in_the_journal(tmp_path: Path) -> None:
    with closing(replica(tmp_path)) as rows:
        before = entries(tmp_path)

        def broken(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO files (id, tenant, created, purpose, num_bytes, facts) VALUES ('a','b',1,'c',2,'d')"
            )
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            rows.write(broken)
        with rows.read() as db:
            assert db.execute("SELECT count(*) FROM files").fetchone()[0] == 0
        assert entries(tmp_path) == before


def test_a_fold_keeps_every_row_and_whoever_was_behind_goes_on(hasty_store: TrainingStore) -> None:
    late = SqliteJobs(hasty_store.rows())
    ids = [hasty_store.jobs.create(new_job(tenant=f"t{number}")).id for number in range(3 * FOLD_ENTRIES)]
    held = hasty_store.queue.claim("w", BASE, lease_s=LEASE_S)
    assert held is not None
    hasty_store.queue.report(held, [NewEvent("one", data={"x": 0.1}, series="train", step=1)])
    # the first entry stays for ever
    assert hasty_store.journal().read(0) is not None and hasty_store.journal().read(1) is None
    seen = hasty_store.jobs.page(None, limit=100)
    assert [job.id for job in seen.items] == ids[::-1]
    assert late.page(None, limit=100) == seen
    with closing(SharedRows(hasty_store.journal(), Clock())) as fresh:
        assert SqliteJobs(fresh).page(None, limit=100) == seen
        for job_id in ids:
            events = hasty_store.jobs.events(job_id, None, limit=9)
            assert len(events.items) >= 3 and SqliteJobs(fresh).events(job_id, None, limit=9) == events


def test_a_checkpoint_that_is_folded_away_before_it_is_read_is_asked_for_again(
    hasty_store: TrainingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_many() -> None:
        # enough for several folds
        for _ in range(8 * FOLD_ENTRIES):
            hasty_store.jobs.create(new_job())

    create_many()
    journal, meanwhile = hasty_store.journal(), [create_many]
    asked = journal.checkpoint

    def checkpoint() -> int:
        """Answer, and let others fold it away."""
        found = asked()
        if meanwhile:
            meanwhile.pop()()
        return found

    monkeypatch.setattr(journal, "checkpoint", checkpoint)
    with closing(SharedRows(journal, Clock())) as fresh:
        assert meanwhile == []
        assert len(SqliteJobs(fresh).page(None, limit=1000).items) == 16 * FOLD_ENTRIES


def test_many_rows_in_each_entry_are_folded_as_well(hasty_store: TrainingStore) -> None:
    hasty_store.jobs.create(new_job())
    held = hasty_store.queue.claim("w", BASE, lease_s=LEASE_S)
    assert held is not None
    for tick in range(10 * FOLD_ENTRIES):
        hasty_store.queue.report(held, [NewEvent(f"{tick} {number}") for number in range(30)])
    assert len(hasty_store.journal().numbers()) < 5 * FOLD_ENTRIES
    with closing(SharedRows(hasty_store.journal(), Clock())) as fresh:
        seen = SqliteJobs(fresh).events(held.job.id, None, limit=10_000)
    assert len(seen.items) == 300 * FOLD_ENTRIES + 4
    assert seen == hasty_store.jobs.events(held.job.id, None, limit=10_000)


def test_numbers_are_not_given_twice_after_a_fold_so_the_order_of_pages_holds(hasty_store: TrainingStore) -> None:
    hasty_store.jobs.create(new_job())
    hasty_store.rows().write(lambda db: db.execute("DELETE FROM jobs"))
    ids = [hasty_store.jobs.create(new_job()).id for _ in range(2 * FOLD_ENTRIES)]
    with closing(SharedRows(hasty_store.journal(), Clock())) as fresh:
        ids.append(SqliteJobs(fresh).create(new_job()).id)
    assert [job.id for job in hasty_store.jobs.page(None, limit=100).items] == ids[::-1]


@pytest.mark.parametrize(
    "harm", ["altered", "missing", "exchanged", "rewritten", "unknown table", "other columns", "other place"]
)
def test_a_damaged_journal_is_named_and_nothing_is_served_on_top_of_it(tmp_path: Path, harm: str) -> None:
    with closing(replica(tmp_path)) as rows:
        jobs = SqliteJobs(rows)
        for _ in range(4):
            jobs.create(new_job())
        files = entries(tmp_path)
        if harm == "altered":
            files[2].write_bytes(files[2].read_bytes().replace(b"acme", b"evil"))
        elif harm == "missing":
            files[2].unlink()
        elif harm == "rewritten":
            # whole and of its place, but not what was followed
            files[2].unlink()
            (tmp_path / "other").mkdir()
            with closing(replica(tmp_path / "other")) as others:
                for _ in range(2):
                    SqliteJobs(others).create(new_job())
            files[2].write_bytes(entries(tmp_path / "other")[2].read_bytes())
        elif harm == "exchanged":
            content = files[2].read_bytes()
            files[2].write_bytes(files[3].read_bytes())
            files[3].write_bytes(content)
        else:
            with rows.read() as db:
                payload = write_entry(RowEntry(5, NOTHING_BEFORE, RowChanges({"jobs": {1: None}})), db)
            changed = {
                "unknown table": payload.replace(b'"jobs"', b'"sqlite_master"'),
                "other columns": payload.replace(b'"tenant"', b'"tenants"'),
                "other place": payload.replace(b'"number":5', b'"number":6'),
            }[harm]
            assert changed != payload
            journal = Journal(tmp_path / "journal", LinkingFileSystem())
            with journal.lock.held():
                assert journal.append(5, changed)
            with pytest.raises(StorageFailed):
                jobs.page(None)
    if harm == "missing":
        # a reader cannot tell the end from a gap; whoever writes looks
        with closing(replica(tmp_path)) as rows, pytest.raises(StorageFailed, match="is missing"):
            SqliteJobs(rows).create(new_job())
        return
    with pytest.raises(StorageFailed):
        replica(tmp_path)


def test_many_hands_on_many_replicas_claim_each_job_once(store: TrainingStore) -> None:
    num_jobs, num_hands = 12, 4
    for number in range(num_jobs):
        store.jobs.create(new_job(tenant=f"t{number}"))
    claimed: list[str] = []
    together = threading.Barrier(num_hands)

    def work(name: str) -> None:
        with closing(SharedRows(store.journal(), Clock(), fold_entries=FOLD_ENTRIES)) as rows:
            queue = SqliteJobQueue(rows)
            together.wait(60.0)
            while (held := queue.claim(name, BASE, lease_s=1e6)) is not None:
                claimed.append(held.job.id)

    hands = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(num_hands)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert sorted(claimed) == sorted(job.id for job in store.jobs.page(None, limit=100).items)
    assert store.jobs.counts()[JobState.RUNNING] == num_jobs


def test_a_store_that_comes_to_be_shared_keeps_its_jobs_and_the_file_is_put_aside(tmp_path: Path) -> None:
    clock = Clock()
    with closing(TrainingDatabase(tmp_path, clock)) as alone:
        job = SqliteJobs(alone).create(new_job())
        events = SqliteJobs(alone).events(job.id, "acme")
    SharedRegistry.open(tmp_path).close()
    for _ in range(2):
        with closing(open_rows(tmp_path, clock)) as rows:
            assert isinstance(rows, SharedRows)
            assert SqliteJobs(rows).get(job.id, "acme") == job
            assert SqliteJobs(rows).events(job.id, "acme") == events
    assert not (tmp_path / TRAINING_FILE).exists() and (tmp_path / f"{TRAINING_FILE}.before-1").is_file()


def test_a_file_of_jobs_that_the_journal_lacks_is_refused_and_kept(tmp_path: Path) -> None:
    SharedRegistry.open(tmp_path).close()
    open_rows(tmp_path, Clock()).close()
    with closing(TrainingDatabase(tmp_path, Clock())) as alone:
        job = SqliteJobs(alone).create(new_job())
    with pytest.raises(InvalidOption, match=job.id):
        open_rows(tmp_path, Clock())
    assert sqlite3.connect(tmp_path / TRAINING_FILE).execute("SELECT id FROM jobs").fetchone() == (job.id,)


def test_a_worker_waits_until_a_server_has_decided_where_jobs_lie(tmp_path: Path) -> None:
    asked: list[None] = []
    (tmp_path / "store").mkdir()

    def is_orphaned() -> bool:
        asked.append(None)
        if len(asked) == 2:
            SharedRegistry.open(tmp_path / "store").close()
        return False

    assert wait_for_store(tmp_path / "store", is_orphaned=is_orphaned)
    assert len(asked) == 2
    with closing(open_rows(tmp_path / "store", Clock())) as rows:
        assert isinstance(rows, SharedRows) and (tmp_path / "store" / TRAINING_JOURNAL).is_dir()
    assert not is_store(tmp_path / "nothing")
    assert not wait_for_store(tmp_path / "nothing", is_orphaned=lambda: True)


def test_a_sweep_leaves_a_job_whose_row_is_on_its_way_to_another_replica(store: TrainingStore) -> None:
    store.folders.make_job("ftjob-coming", {}, {})
    ended = store.jobs.create(new_job())
    store.folders.make_job(ended.id, {}, {})
    store.jobs.cancel(ended.id, "acme")
    assert store.kept_jobs() == {"ftjob-coming", ended.id}
    store.one_more().sweep(store.jobs.states, store.files.known_ids)
    assert store.kept_jobs() == {"ftjob-coming"}


class AwayJournal(Journal):
    """A journal whose place does not answer while it is told so."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, LinkingFileSystem())
        self.is_away, self.num_asked = False, 0

    def read(self, number: int) -> bytes | None:
        """Answer, or not."""
        self.num_asked += 1
        if self.is_away:
            raise StoreAway
        return super().read(number)


def test_a_place_that_does_not_answer_is_not_asked_by_everybody_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(shared_rows, "time", SimpleNamespace(monotonic=lambda: now[0]))
    journal = AwayJournal(tmp_path / "journal")
    with closing(SharedRows(journal, Clock())) as rows:
        jobs = SqliteJobs(rows)
        journal.is_away, journal.num_asked = True, 0
        for ask in (lambda: jobs.page(None), lambda: jobs.create(new_job()), lambda: jobs.counts()):
            with pytest.raises(StoreAway):
                ask()
        assert journal.num_asked == 1
        journal.is_away = False
        with pytest.raises(StoreAway):
            jobs.page(None)
        now[0] += 10.0
        assert jobs.page(None).items == ()
        jobs.create(new_job())
        assert len(jobs.page(None).items) == 1

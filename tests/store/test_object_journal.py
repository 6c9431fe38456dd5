"""A journal in an object store: a number is given once, also to a writer that slept while others wrote and folded."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

from obstore.store import MemoryStore

from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.shared_rows import SharedRows
from adapters_store.object_journal import ObjectJournal
from adapters_store.object_store import Listed
from adapters_store.registry_redis import SharedRegistry
from tests.finetuning.training_store import Clock, new_job
from tests.memory_objects import MemoryObjects
from tests.store.registry_cases import Alone, new

HOUR_S = 3600.0


class AgingObjects(MemoryObjects):
    """Objects of which some were written long ago."""

    def __init__(self, memory: MemoryStore) -> None:
        """Begin with none of these."""
        super().__init__(memory)
        self.age_s: dict[str, float] = {}

    def list(self, prefix: str, *, after: str | None = None) -> Iterator[Listed]:
        """Yield them as a listing at that time would."""
        for listed in super().list(prefix, after=after):
            yield replace(listed, modified=listed.modified - timedelta(seconds=self.age_s.get(listed.key, 0.0)))


def journal_of(objects: MemoryObjects, clock: Clock, count: int = 0) -> ObjectJournal:
    """Return one writer's view, which has written the entries 0 to `count` - 1."""
    journal = ObjectJournal(objects, "journal", clock=clock)
    for number in range(count):
        journal.numbers()
        assert journal.append(number, b"%d" % number)
    return journal


def test_a_writer_that_slept_through_folds_does_not_get_a_number_that_was_taken() -> None:
    objects, clock = MemoryObjects(MemoryStore()), Clock()
    one, slow = journal_of(objects, clock, 2), journal_of(objects, clock)
    assert slow.numbers() == [0, 1]
    for number in range(2, 20):
        one.numbers()
        assert one.append(number, b"%d" % number)
        one.forget_before(number)
    assert not slow.append(2, b"lost")
    assert one.read(2) == b"2" and one.read(19) == b"19"


def test_whoever_looked_too_long_ago_looks_again() -> None:
    objects, clock = MemoryObjects(MemoryStore()), Clock()
    slow = journal_of(objects, clock)
    # entry 0 stays for ever, so there is nothing to look for
    assert slow.append(0, b"0")
    assert not slow.append(1, b"never looked")
    assert slow.numbers() == [0]
    clock.now += HOUR_S / 2
    assert not slow.append(1, b"looked too long ago")
    assert slow.numbers() == [0]
    clock.now -= 1.0
    assert not slow.append(1, b"the clock was put back")
    assert slow.numbers() == [0]
    clock.now += HOUR_S / 2 - 1
    assert slow.append(1, b"1") and slow.numbers() == [0, 1]


def test_a_needless_entry_goes_an_hour_after_it_was_written() -> None:
    objects, clock = AgingObjects(MemoryStore()), Clock()
    journal = journal_of(objects, clock, 9)
    objects.age_s = {f"journal/{number:012d}": HOUR_S - 60.0 if number == 3 else HOUR_S for number in range(9)}
    assert journal.forget_before(6) == 4
    assert [number for number in range(9) if journal.read(number) is not None] == [0, 3, 6, 7, 8]
    # what readers need, in one listing that does not grow with what is kept
    assert journal.numbers() == [6, 7, 8]
    objects.age_s = dict.fromkeys(objects.age_s, HOUR_S)
    assert journal.forget_before(8) == 3 and journal.numbers() == [8]
    assert [listed.key for listed in objects.list("journal-checkpoints")] == ["journal-checkpoints/000000000008"]


class SleepyJournal(ObjectJournal):
    """A journal whose writer sleeps before its next append."""

    def __init__(self, objects: MemoryObjects) -> None:
        super().__init__(objects, "journal", clock=Clock())
        self.meanwhile: Callable[[], None] = lambda: None

    def append(self, number: int, payload: bytes) -> bool:
        """Let others work first."""
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return super().append(number, payload)


def test_no_publication_is_lost_to_a_fold_that_came_in_between() -> None:
    memory = MemoryStore()
    journal = SleepyJournal(MemoryObjects(memory))
    one, slow = SharedRegistry(ObjectJournal(MemoryObjects(memory), "journal")), SharedRegistry(journal)
    for registry in (one, slow):
        registry.connect(Alone())
    one.publish(new("it", "a"))

    def publish_and_fold() -> None:
        one.publish(new("it", "b"))
        one.fold(retired_since=0)

    slow.catch_up()
    journal.meanwhile = publish_and_fold
    assert slow.publish(new("it", "c")).version == 3
    one.catch_up()
    assert [version.version for version in one.versions("it")] == [1, 2, 3]


def test_no_job_is_lost_to_folds_that_came_in_between() -> None:
    memory = MemoryStore()
    journal = SleepyJournal(MemoryObjects(memory))
    with (
        closing(SharedRows(ObjectJournal(MemoryObjects(memory), "journal"), Clock(), fold_entries=2)) as one,
        closing(SharedRows(journal, Clock(), fold_entries=2)) as slow,
    ):
        jobs = SqliteJobs(one)

        def create_many() -> None:
            for _ in range(9):
                jobs.create(new_job())

        journal.meanwhile = create_many
        kept = SqliteJobs(slow).create(new_job())
        assert kept.id in {job.id for job in jobs.page(None, limit=100).items}

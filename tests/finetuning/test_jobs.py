"""The job store: leases, fencing tokens, states, turns of tenants, pages; every wrong hand is turned away."""

import random
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from adapters_store.jobs.job import ENDED, Claim, JobError, JobState, NewEvent, Promotion, Trained
from adapters_store.jobs.job import Progress as JobProgress
from adapters_store.jobs.job_errors import JobNotFound, LeaseLost, TooManyJobs, WrongJobState
from adapters_store.jobs.model_name import model_name
from adapters_store.jobs.queue_sqlite import MAX_LOST
from adapters_store.names import check_name
from tests.finetuning.training_store import BASE, KINDS, LEASE_S, TrainingStore, new_job

TRAINED = Trained(export="exports/final", metrics={"train_loss": 0.5}, trained_tokens=10, provenance={})


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainingStore]:
    """Return an empty store of jobs, of either kind."""
    with closing(TrainingStore(tmp_path, kind=request.param)) as store:
        yield store


def claim(store: TrainingStore, worker: str = "w") -> Claim:
    """Claim a job that must be there."""
    found = store.queue.claim(worker, BASE, lease_s=LEASE_S)
    assert found is not None
    return found


def progress(step: int) -> JobProgress:
    """Return how far a job is."""
    return JobProgress(step, 10, 0.5, started=0.0, updated=0.0, steps_per_s=1.0)


def write_everything(store: TrainingStore, held: Claim) -> list[str]:
    """Try all that a worker may write; return what was refused."""
    refused = []
    writes: dict[str, Callable[[], None]] = {
        "renew": lambda: store.queue.renew(held, lease_s=LEASE_S),
        "report": lambda: store.queue.report(held, [NewEvent("late")], progress(9)),
        "checkpoint": lambda: store.queue.add_checkpoint(held, 9, "exports/late", {}),
        "fail": lambda: store.queue.fail(held, JobError("late", "late")),
        "give_back": lambda: store.queue.give_back(held),
        "hand_over": lambda: store.queue.hand_over(held, TRAINED),
    }
    for name, write in writes.items():
        try:
            write()
        except LeaseLost:
            refused.append(name)
    return refused


ALL_WRITES = ["renew", "report", "checkpoint", "fail", "give_back", "hand_over"]


def test_a_worker_whose_lease_ran_out_can_write_nothing_even_if_nobody_took_the_job(store: TrainingStore) -> None:
    job = store.jobs.create(new_job())
    held = claim(store)
    store.clock.now += LEASE_S
    before = store.jobs.events(job.id, None, limit=100)
    assert write_everything(store, held) == ALL_WRITES
    assert store.jobs.events(job.id, None, limit=100) == before
    assert store.jobs.get(job.id, None).progress is None
    assert store.outbox.parcels(BASE) == []


@pytest.mark.parametrize("end", ["taken over", "cancelled", "paused", "handed over", "failed", "given back"])
def test_a_void_token_can_write_nothing_while_its_lease_still_runs(store: TrainingStore, end: str) -> None:
    job = store.jobs.create(new_job())
    held = claim(store)
    if end == "taken over":
        store.clock.now += LEASE_S
        claim(store, "other")
    elif end == "cancelled":
        store.jobs.cancel(job.id, "acme")
    elif end == "paused":
        store.jobs.pause(job.id, "acme")
    elif end == "handed over":
        store.queue.hand_over(held, TRAINED)
    elif end == "failed":
        store.queue.fail(held, JobError("nan", "the loss is NaN"))
    else:
        store.queue.give_back(held)
    state, num_parcels = store.jobs.get(job.id, None).state, len(store.outbox.parcels(BASE))
    assert write_everything(store, held) == ALL_WRITES
    assert store.jobs.get(job.id, None).state == state
    assert len(store.outbox.parcels(BASE)) == num_parcels


def test_two_workers_never_hold_one_job_and_renewing_keeps_it(store: TrainingStore) -> None:
    store.jobs.create(new_job())
    held = claim(store)
    for _ in range(5):
        store.clock.now += LEASE_S - 1
        store.queue.renew(held, lease_s=LEASE_S)
        assert store.queue.claim("other", BASE, lease_s=LEASE_S) is None
    store.clock.now += LEASE_S
    assert claim(store, "other").token == held.token + 1


def test_a_job_of_another_base_is_not_taken(store: TrainingStore) -> None:
    store.jobs.create(new_job(base="sha256:other"))
    assert store.queue.claim("w", BASE, lease_s=LEASE_S) is None


def test_a_job_that_kills_its_workers_is_given_up_unless_it_comes_further(store: TrainingStore) -> None:
    job = store.jobs.create(new_job())
    for attempt in range(3 * MAX_LOST):
        store.queue.report(claim(store), [], progress(attempt + 1))
        store.clock.now += LEASE_S
    for _ in range(MAX_LOST):
        claim(store)
        store.clock.now += LEASE_S
    assert store.queue.claim("w", BASE, lease_s=LEASE_S) is None
    found = store.jobs.get(job.id, None)
    assert found.state == JobState.FAILED
    assert found.error is not None and found.error.code == "worker_lost"


def test_tenants_take_turns_whoever_queued_more(store: TrainingStore) -> None:
    for tenant in ("many", "many", "many", "one", "two"):
        store.jobs.create(new_job(tenant))
    order = [claim(store).job.tenant for _ in range(5)]
    assert order == ["many", "one", "two", "many", "many"]


def test_a_foreign_job_and_an_unknown_one_are_the_same(store: TrainingStore) -> None:
    job = store.jobs.create(new_job("acme"))
    calls = (store.jobs.get, store.jobs.cancel, store.jobs.pause, store.jobs.resume, store.jobs.events)
    for call in (*calls, store.jobs.checkpoints):
        messages = set()
        for job_id in (job.id, "ftjob-" + "0" * 24):
            with pytest.raises(JobNotFound) as refused:
                call(job_id, "eve")
            messages.add(refused.value.message.replace(job_id, "ID"))
        assert len(messages) == 1
    with pytest.raises(JobNotFound):
        store.jobs.page("eve", after=job.id)
    assert store.jobs.page("eve").items == ()
    assert [each.id for each in store.jobs.page(None).items] == [job.id]


def test_no_tenant_has_more_unfinished_jobs_than_its_bound(store: TrainingStore) -> None:
    jobs = [store.jobs.create(new_job(), max_unfinished=2) for _ in range(2)]
    with pytest.raises(TooManyJobs, match="the limit is 2"):
        store.jobs.create(new_job(), max_unfinished=2)
    store.jobs.create(new_job("other"), max_unfinished=2)
    store.jobs.cancel(jobs[0].id, "acme")
    store.jobs.create(new_job(), max_unfinished=2)


def test_states_change_only_along_their_arrows(store: TrainingStore) -> None:
    job = store.jobs.create(new_job())
    with pytest.raises(WrongJobState, match="is queued"):
        store.jobs.resume(job.id, "acme")
    assert store.jobs.pause(job.id, "acme").state == JobState.PAUSED
    assert store.queue.claim("w", BASE, lease_s=LEASE_S) is None
    assert store.jobs.resume(job.id, "acme").state == JobState.QUEUED
    store.queue.hand_over(claim(store), TRAINED)
    for change in (store.jobs.cancel, store.jobs.pause, store.jobs.resume):
        with pytest.raises(WrongJobState, match="is publishing"):
            change(job.id, "acme")
    store.published(store.outbox.parcels(BASE)[0])
    ended = store.jobs.get(job.id, None)
    assert ended.state == JobState.SUCCEEDED
    assert ended.fine_tuned_model == ended.model_name and ended.finished is not None
    with pytest.raises(WrongJobState, match="is succeeded"):
        store.jobs.cancel(job.id, "acme")


def test_the_same_step_told_twice_is_one_event_and_one_checkpoint(store: TrainingStore) -> None:
    job = store.jobs.create(new_job())
    held = claim(store)
    for _ in range(2):
        told = NewEvent("Step 1", data={"step": 1}, series="train", step=1)
        store.queue.report(held, [told])
        store.queue.add_checkpoint(held, 1, "exports/step-1", {"train_loss": 0.5})
        store.clock.now += LEASE_S
        held = claim(store)
    events = store.jobs.events(job.id, None, limit=100).items
    assert [event.type for event in events].count("metrics") == 1
    assert len(store.outbox.parcels(BASE)) == 1


def test_checkpoints_are_listed_once_published_and_never_of_a_cancelled_job(store: TrainingStore) -> None:
    job = store.jobs.create(new_job())
    held = claim(store)
    for step in (1, 2):
        store.queue.add_checkpoint(held, step, f"exports/step-{step}", {"train_loss": 1.0 / step})
    assert store.jobs.checkpoints(job.id, "acme").items == ()
    first, second = store.outbox.parcels(BASE)
    store.published(first)
    store.refused(second, JobError("unsupported_adapter", "no"))
    (listed,) = store.jobs.checkpoints(job.id, "acme").items
    assert listed.model_name == f"{job.model_name}:ckpt-step-1" and listed.metrics == {"train_loss": 1.0}
    assert not store.outbox.is_waiting(first)
    store.queue.add_checkpoint(held, 3, "exports/step-3", {})
    store.jobs.cancel(job.id, "acme")
    assert store.outbox.parcels(BASE) == []


def test_pages_hold_every_item_once_newest_first(store: TrainingStore) -> None:
    ids = [store.jobs.create(new_job(metadata={"run": str(number % 2)})).id for number in range(7)]
    ids.append(store.jobs.create(new_job()).id)
    seen: list[str] = []
    while True:
        page = store.jobs.page("acme", after=seen[-1] if seen else None, limit=3)
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
    assert seen == ids[::-1]
    odd = store.jobs.page("acme", metadata={"run": "1"}, limit=100)
    assert [job.id for job in odd.items] == [ids[5], ids[3], ids[1]]
    assert [job.id for job in store.jobs.page("acme", without_metadata=True).items] == [ids[7]]
    events = store.jobs.events(ids[0], "acme", limit=2)
    rest = store.jobs.events(ids[0], "acme", after=events.items[-1].id, limit=100)
    assert events.has_more and not rest.has_more
    assert rest.items[-1].message.startswith("Created fine-tuning job")


@pytest.mark.parametrize("tenant", ["a", "t" * 63])
@pytest.mark.parametrize("base", ["demo", "some-org/" + "Base_1.5 B" * 20])
@pytest.mark.parametrize("suffix", [None, "x", "s" * 64])
def test_every_name_may_be_given_to_an_adapter_also_a_checkpoints(tenant: str, base: str, suffix: str | None) -> None:
    name = model_name(new_job(tenant, model=base, suffix=suffix), "ftjob-0123456789abcdef01234567")
    check_name(f"{name}:ckpt-step-1000000", "demo")
    assert name.startswith("ft:") and name.endswith(":01234567")
    assert name.split(":")[3] == (suffix or "")


def test_a_promotion_holds_only_for_a_measured_metric_beyond_its_bound() -> None:
    above = Promotion("bot", "valid_loss", above=0.5)
    assert above.holds({"valid_loss": 0.6}) and not above.holds({"valid_loss": 0.5})
    assert not above.holds({}) and not above.holds({"valid_loss": "1"}) and not above.holds({"valid_loss": True})
    assert Promotion("bot", "valid_loss", below=0.5).holds({"valid_loss": 0.4})


def test_random_histories_keep_one_holder_and_one_end(store: TrainingStore) -> None:
    random_numbers = random.Random(11)
    good: dict[str, int] = {}
    held: list[Claim] = []
    ended: dict[str, JobState] = {}
    for _ in range(400):
        act = random_numbers.choice(["create", "claim", "claim", "write", "pause", "resume", "cancel", "end", "wait"])
        ids = [job.id for job in store.jobs.page(None, limit=100).items]
        job_id = random_numbers.choice(ids) if ids else ""
        if act == "create" and len(ids) < 20:
            store.jobs.create(new_job(random_numbers.choice(["a", "b"])))
        elif act == "claim" and (found := store.queue.claim("w", BASE, lease_s=LEASE_S)) is not None:
            assert found.token > good.get(found.job.id, 0)
            good[found.job.id] = found.token
            held.append(found)
        elif act in ("write", "end") and held:
            each = random_numbers.choice(held)
            try:
                if act == "write":
                    store.queue.report(each, [NewEvent("step")])
                elif random_numbers.random() < 0.5:
                    store.queue.hand_over(each, TRAINED)
                else:
                    store.queue.fail(each, JobError("x", "x"))
                assert each.token == good[each.job.id]
            except LeaseLost:
                pass
        elif act in ("pause", "resume", "cancel") and job_id:
            changes = {"pause": store.jobs.pause, "resume": store.jobs.resume, "cancel": store.jobs.cancel}
            with suppress(WrongJobState):
                changes[act](job_id, None)
        elif act == "wait":
            store.clock.now += LEASE_S * random_numbers.random()
        for parcel in store.outbox.parcels(BASE)[:1]:
            store.published(parcel)
        for job in store.jobs.page(None, limit=100).items:
            assert ended.get(job.id, job.state) == job.state
            if job.state in ENDED:
                ended[job.id] = job.state
    assert set(ended.values()) == ENDED and sum(store.jobs.counts().values()) == 20

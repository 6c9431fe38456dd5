"""What a store of training jobs promises, in three parts: to its tenants, to its workers, and to who publishes.

Implemented over `TrainingRows`. Invariants: a job is held by one worker at a time, by a lease that must be renewed;
each claim gets a larger token, and what carries an older token, or comes after the lease has run out, changes nothing;
a job ends once.
"""

from collections.abc import Iterable
from typing import Protocol

from adapters_store.jobs.job import (
    Checkpoint,
    Claim,
    Job,
    JobError,
    JobEvent,
    JobPage,
    JobState,
    NewEvent,
    NewJob,
    Parcel,
    Progress,
    Trained,
)
from adapters_store.strict_json import Json


class Jobs(Protocol):
    """A tenant's side. `tenant` None is the operator, who sees all; others' jobs do not exist (JobNotFound)."""

    def create(self, new: NewJob, *, job_id: str | None = None, max_unfinished: int | None = None) -> Job:
        """Queue a job; raises TooManyJobs."""
        ...

    def get(self, job_id: str, tenant: str | None) -> Job:
        """Return a job; raises JobNotFound."""
        ...

    def page(
        self,
        tenant: str | None,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: dict[str, str] | None = None,
        without_metadata: bool = False,
    ) -> JobPage[Job]:
        """Return jobs, newest first; raises JobNotFound for an unknown `after`."""
        ...

    def cancel(self, job_id: str, tenant: str | None) -> Job:
        """End a job for good, at once: its worker's token is void; raises WrongJobState."""
        ...

    def pause(self, job_id: str, tenant: str | None) -> Job:
        """Let a job rest, at once; what it had saved stays. Raises WrongJobState."""
        ...

    def resume(self, job_id: str, tenant: str | None) -> Job:
        """Queue a paused job again; raises WrongJobState."""
        ...

    def events(
        self, job_id: str, tenant: str | None, *, after: str | None = None, limit: int = 20
    ) -> JobPage[JobEvent]:
        """Return a job's events, newest first; raises JobNotFound for an unknown job or `after`."""
        ...

    def checkpoints(
        self, job_id: str, tenant: str | None, *, after: str | None = None, limit: int = 10
    ) -> JobPage[Checkpoint]:
        """Return a job's published checkpoints, newest first; raises JobNotFound."""
        ...

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state, zeros included."""
        ...

    def running(self) -> list[Job]:
        """Return the jobs that are being trained."""
        ...

    def states(self, job_ids: list[str]) -> dict[str, JobState]:
        """Return the states of those jobs that there are."""
        ...


class JobQueue(Protocol):
    """A worker's side. Every method that takes a claim raises LeaseLost if it does not hold any more."""

    def claim(self, worker: str, base: str, *, lease_s: float) -> Claim | None:
        """Take the next job of this base: one that waits, or one whose worker's lease has run out; None: nothing to do.

        Tenants take turns. A job that has lost several workers without having come further fails instead.
        """
        ...

    def renew(self, claim: Claim, *, lease_s: float) -> None:
        """Hold on for so long from now."""
        ...

    def check(self, claim: Claim) -> None:
        """Do nothing; costs no write."""
        ...

    def is_paused(self, job_id: str) -> bool:
        """Return whether a job was paused."""
        ...

    def report(self, claim: Claim, events: Iterable[NewEvent], progress: Progress | None = None) -> None:
        """Add events, and say how far the job is."""
        ...

    def add_checkpoint(self, claim: Claim, step: int, export: str, metrics: dict[str, Json]) -> None:
        """Hand over an exported checkpoint; the same step again changes nothing."""
        ...

    def hand_over(self, claim: Claim, trained: Trained) -> None:
        """Give the finished adapter to who publishes; the claim ends."""
        ...

    def fail(self, claim: Claim, error: JobError) -> None:
        """End the job; the claim ends."""
        ...

    def give_back(self, claim: Claim, *, was_lost: bool = False) -> None:
        """Queue the job again, in its old place, for any worker; the claim ends. `was_lost` counts as a dead worker."""
        ...


class Outbox(Protocol):
    """The publisher's side; who calls holds the job folder's lock, so one process publishes a job at a time."""

    def parcels(self, base: str) -> list[Parcel]:
        """Return what waits to be published, a job's checkpoints before its result."""
        ...

    def is_waiting(self, parcel: Parcel) -> bool:
        """Return whether the parcel still waits."""
        ...

    def published(self, parcel: Parcel, *, result_files: tuple[str, ...] = ()) -> None:
        """Note that the adapter can be asked for; for the job's own, that the job has succeeded."""
        ...

    def refused(self, parcel: Parcel, error: JobError) -> None:
        """Note that the adapter cannot be published; the job fails if it was its own."""
        ...

    def tell(self, job_id: str, event: NewEvent) -> None:
        """Add an event to a job that is published or ended."""
        ...

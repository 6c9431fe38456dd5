"""What is kept of a training job, its events and its checkpoints: plain values, no database, no HTTP.

Owns the states a job goes through and which of them are ends. Invariant: a job's facts never change after it was made;
what changes (state, progress, result, error) changes in transactions of `Jobs`, `JobQueue` and `Outbox` alone.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from adapters_store.strict_json import Json

Item = TypeVar("Item")


class JobState(StrEnum):
    """Where a job is; OpenAI's clients know neither `paused` nor `publishing`, so the API shows those otherwise."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    # trained; a server that holds the engine converts, proves and publishes it
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True, slots=True)
class Promotion:
    """What becomes of a good result: when `metric` is above (or below) its bound, `name`'s alias moves to it.

    `name` gets the adapter as its next version; `canary` is the share of its requests, in percent, that the version
    gets before the alias moves; None: no canary.
    """

    name: str
    metric: str
    above: float | None = None
    below: float | None = None
    alias: str = "stable"
    canary: float | None = None

    def holds(self, metrics: dict[str, Json]) -> bool:
        """Return whether the job's last metrics satisfy the condition; a metric that was not measured does not."""
        value = metrics.get(self.metric)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (self.above is None or value > self.above) and (self.below is None or value < self.below)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job before it has an id.

    Attributes:
        tenant: whose it is; the adapter it makes will be, too.
        base: fingerprint of the base's weights: only workers of this base may take it.
        model: the base's name, as the client sent it.
        spec: `TrainSpec.to_json()`.
        hyperparameters: what OpenAI's clients are shown of the spec, with "auto" decided.
        sources: digests of the adapters that the job reads, by the names it calls them.
    """

    tenant: str
    base: str
    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    spec: dict[str, Json]
    hyperparameters: dict[str, Json]
    metadata: dict[str, str] | None
    promotion: Promotion | None
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed, as OpenAI's clients read it."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """The last step that was reported; times are unix seconds."""

    step: int
    total_steps: int
    train_loss: float | None
    started: float
    updated: float
    steps_per_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it stands. `fine_tuned_model` is set once the adapter can be asked for."""

    id: str
    new: NewJob
    state: JobState
    created: int
    finished: int | None
    # the name that the adapter will have, without its owner
    model_name: str
    fine_tuned_model: str | None
    token: int
    progress: Progress | None
    trained_tokens: int | None
    metrics: dict[str, Json]
    result_files: tuple[str, ...]
    error: JobError | None

    @property
    def tenant(self) -> str:
        """Return whose job it is."""
        return self.new.tenant


@dataclass(frozen=True, slots=True)
class NewEvent:
    """Something to tell of a job. Metrics carry their step: the same step told twice is kept once."""

    message: str
    level: str = "info"
    data: dict[str, Json] | None = None
    # set for metrics only: "train" or "valid", and the step
    series: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event as it is kept."""

    id: str
    created: int
    level: str
    message: str
    type: str
    data: dict[str, Json] | None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published checkpoint: `model_name` can be asked for."""

    id: str
    job_id: str
    created: int
    step: int
    model_name: str
    metrics: dict[str, Json]


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's hold on a job: whatever it writes must carry the token, which the next claim makes void."""

    job: Job
    worker: str
    token: int


@dataclass(frozen=True, slots=True)
class Trained:
    """What a finished training leaves; `export` is the exported adapter's folder, relative to the job's."""

    export: str
    metrics: dict[str, Json]
    trained_tokens: int
    provenance: dict[str, Json]


@dataclass(frozen=True, slots=True)
class Parcel:
    """An exported adapter that waits to be published: the job's own (`step` None), or one of its checkpoints."""

    job: Job
    step: int | None
    export: str

    @property
    def model_name(self) -> str:
        """Return the name it will have, without its owner."""
        return self.job.model_name if self.step is None else f"{self.job.model_name}:ckpt-step-{self.step}"


@dataclass(frozen=True, slots=True)
class JobPage(Generic[Item]):
    """Part of a list, newest first."""

    items: tuple[Item, ...]
    has_more: bool

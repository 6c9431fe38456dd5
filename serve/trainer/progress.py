"""What a training run is given, what it tells while it runs, and how it fails: the types between loop and worker.

Owns no behaviour and imports no torch. Invariant: a run ends in exactly one `Finished`, one `Stopped` or one
`TrainingFailed`; everything that outlives the process lies under `TrainingRun.folder`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json

Signal: TypeAlias = Literal["run", "pause", "cancel"]


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter of the registry, as the folder of its canonical download (`adapter.json`, `adapter.safetensors`)."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One job as the loop sees it.

    `experts` stand in the order of `spec.experts`, `disjoint_with` in the order of the spec's; `device` is torch's name
    of one, `memory_cap_bytes` bounds what the run may take of a CUDA device (None: no bound), `code_version` and
    `parent` go into the provenance as they are.
    """

    base: Path
    train_file: Path
    valid_file: Path | None
    spec: TrainSpec
    folder: Path
    experts: tuple[NamedAdapter, ...] = ()
    disjoint_with: tuple[NamedAdapter, ...] = ()
    device: str = "cpu"
    memory_cap_bytes: int | None = None
    code_version: str = ""
    parent: str = ""


class Control(Protocol):
    """Asked once before every optimiser step, and once more before the end."""

    def check(self) -> Signal:
        """Say whether to go on; "pause" saves a checkpoint and ends with `Stopped`, "cancel" ends without."""
        ...


@dataclass(frozen=True, slots=True)
class AlwaysRun:
    """The control of a run that nobody stops."""

    def check(self) -> Signal:
        """Go on."""
        return "run"


@dataclass(frozen=True, slots=True)
class Started:
    """Data and model are ready; `resumed_step` is 0 for a fresh run, `spec` the resolved one.

    `num_cut` of the examples' rows were longer than its `max_length` and are learnt without their ends.
    """

    total_steps: int
    resumed_step: int
    spec: TrainSpec
    num_examples: int
    num_valid_examples: int
    num_trainable: int
    num_cut: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimiser step; `tokens` is the number trained on so far, `train_loss` per learnt token of this step."""

    step: int
    total_steps: int
    train_loss: float
    train_mean_token_accuracy: float
    tokens: int
    lr: float
    # e.g. MeteoRA's gate_loss and gate_accuracy
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validated:
    """The validation data's loss per learnt token after `step` steps."""

    step: int
    valid_loss: float
    valid_mean_token_accuracy: float


@dataclass(frozen=True, slots=True)
class Retold:
    """A step or validation of before a kill or pause, for whoever did not hear of it; its `tokens` are those of now."""

    told: StepDone | Validated


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """`adapter` is a folder as in `Finished`; it and everything before it survive a kill from now on."""

    step: int
    adapter: Path
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The run was paused or cancelled after `step` steps; a paused one goes on from there when it is run again."""

    step: int
    reason: Literal["pause", "cancel"]


@dataclass(frozen=True, slots=True)
class Finished:
    """`adapter` holds the files of one upload, `upload.json` {"format", "options", "files"} and `provenance.json`."""

    adapter: Path
    metrics: Mapping[str, float]
    trained_tokens: int
    provenance: Mapping[str, Json]


Progress: TypeAlias = Started | StepDone | Validated | Retold | CheckpointSaved | Stopped | Finished
Report: TypeAlias = Callable[[Progress], None]


class TrainingFailed(Exception):
    """The job cannot succeed; `code` is nan, oom, bad_data, bad_checkpoint, bad_expert, bad_base or bad_spec."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

"""What passes between a worker and its walled training process: one request, then lines of JSON.

Owns both directions' spelling; imports no torch. Invariant: what the training process says is read as a stranger's: a
line is bounded, and anything but a known message is the end of that process.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters_store.jobs.spec import TrainSpec
from serve.trainer.progress import (
    CheckpointSaved,
    Finished,
    NamedAdapter,
    Progress,
    Retold,
    Started,
    StepDone,
    Stopped,
    TrainingFailed,
    TrainingRun,
    Validated,
)

MAX_LINE_BYTES = 1 << 20
_KINDS = {kind.__name__: kind for kind in (StepDone, Validated, Stopped)}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """One job as the training process is told of it; paths are absolute.

    `inputs` holds train.jsonl, valid.jsonl (if there is one), experts/N and disjoint/N.
    """

    base: str
    inputs: str
    folder: str
    spec: dict[str, object]
    device: str
    num_threads: int
    max_memory_bytes: int | None
    device_memory_bytes: int | None
    max_seconds: int
    code_version: str
    parent: str

    def to_json(self) -> str:
        """Return the request as one argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunRequest":
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def run(self) -> TrainingRun:
        """Return the loop's view of it."""
        inputs = Path(self.inputs)
        spec = TrainSpec.parse(self.spec)  # type: ignore[arg-type]
        valid = inputs / "valid.jsonl"
        return TrainingRun(
            base=Path(self.base),
            train_file=inputs / "train.jsonl",
            valid_file=valid if valid.exists() else None,
            spec=spec,
            folder=Path(self.folder),
            experts=_named(spec.experts, inputs / "experts"),
            disjoint_with=_named(spec.disjoint_with, inputs / "disjoint"),
            device=self.device,
            memory_cap_bytes=self.device_memory_bytes,
            code_version=self.code_version,
            parent=self.parent,
        )


class BrokenChild(Exception):
    """The training process said something that is no message."""


def encode(progress: Progress) -> bytes:
    """Return one line; large facts (the spec, the provenance) stay in the run's folder."""
    if isinstance(progress, Retold):
        return encode(progress.told)
    if isinstance(progress, Started):
        facts: dict[str, object] = {
            "total_steps": progress.total_steps,
            "resumed_step": progress.resumed_step,
            "num_trainable": progress.num_trainable,
            "num_cut": progress.num_cut,
            "max_length": progress.spec.max_length,
        }
    elif isinstance(progress, CheckpointSaved):
        facts = {"step": progress.step, "adapter": str(progress.adapter), "metrics": dict(progress.metrics)}
    elif isinstance(progress, Finished):
        facts = {
            "adapter": str(progress.adapter),
            "metrics": dict(progress.metrics),
            "trained_tokens": progress.trained_tokens,
        }
    else:
        facts = asdict(progress)
    return json.dumps({"kind": type(progress).__name__, **facts}).encode() + b"\n"


def encode_missing(layers: tuple[str, ...]) -> bytes:
    """Return the line that names the walls that do not stand."""
    return json.dumps({"kind": "WallsMissing", "layers": layers}).encode() + b"\n"


def encode_failure(failure: TrainingFailed) -> bytes:
    """Return the line that says why training failed."""
    return json.dumps({"kind": "Failed", "code": failure.code[:64], "message": failure.message[:2000]}).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Begun:
    """`Started`, as the worker hears it."""

    total_steps: int
    resumed_step: int
    num_trainable: int
    num_cut: int
    max_length: int

    @property
    def cut(self) -> str:
        """Return what is to be said of rows that were cut; empty if none was."""
        if not self.num_cut:
            return ""
        rows = "1 example is" if self.num_cut == 1 else f"{self.num_cut} examples are"
        return f"{rows} longer than max_length {self.max_length} tokens, and learnt without the end"


@dataclass(frozen=True, slots=True)
class WallsMissing:
    """Layers of `adapters_store.convert.sandbox` that this kernel lacks."""

    layers: tuple[str, ...]


Heard = WallsMissing | Begun | StepDone | Validated | CheckpointSaved | Stopped | Finished


def decode(line: bytes) -> Heard:
    """Read one line.

    Raises:
        TrainingFailed: the line says so. BrokenChild: it is no message.
    """
    try:
        facts = json.loads(line)
        kind = facts.pop("kind")
        if kind == "Failed":
            raise TrainingFailed(str(facts["code"]), str(facts["message"]))
        if kind == "WallsMissing":
            return WallsMissing(tuple(str(layer) for layer in facts["layers"]))
        if kind == "Started":
            return Begun(**{name: int(value) for name, value in facts.items()})
        if kind == "CheckpointSaved":
            return CheckpointSaved(int(facts["step"]), Path(facts["adapter"]), _numbers(facts["metrics"]))
        if kind == "Finished":
            return Finished(Path(facts["adapter"]), _numbers(facts["metrics"]), int(facts["trained_tokens"]), {})
        heard: Heard = _KINDS[kind](**facts)
        return heard
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenChild(f"not a message: {line[:200]!r}") from error


def _numbers(metrics: dict[str, object]) -> dict[str, float]:
    return {str(name): float(str(value)) for name, value in metrics.items()}


def _named(names: tuple[str, ...], folder: Path) -> tuple[NamedAdapter, ...]:
    return tuple(NamedAdapter(name, folder / str(index)) for index, name in enumerate(names))

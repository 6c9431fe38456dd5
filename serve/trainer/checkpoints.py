"""Resume points: what a run needs to go on bit by bit, in safetensors and JSON, whole or not there.

Owns `folder/resume/step-N/{state.safetensors, state.json, digests.json}`. Invariants: a point appears by one rename
after all its bytes are on the disk; one whose bytes do not match their digests, or that belongs to another job, is
never loaded: the next older one is, or none.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_store.errors import StoreError
from adapters_store.strict_json import Json, canonical_json, read_json

_STATE, _FACTS, _DIGESTS = "state.safetensors", "state.json", "digests.json"
_POINT = re.compile(r"step-([0-9]{9})\Z")
_MAX_FACTS_BYTES = 64 << 20
_NUM_KEPT = 2


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The state after `step` optimiser steps: tensors by name, and plain facts."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Json]


def save_point(folder: Path, point: ResumePoint, job: str) -> None:
    """Write a point of the job whose digest is `job`, and remove all but the newest two."""
    root = folder / "resume"
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{point.step:09d}"
    if target.exists():
        # bit-equal by the loop's own law, unless it is damaged: then the new one takes its place
        shutil.rmtree(target)
    temporary = root / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in point.tensors.items()}, temporary / _STATE)
    (temporary / _FACTS).write_bytes(canonical_json({"job": job, "step": point.step, "facts": {**point.facts}}))
    digests: dict[str, Json] = {name: file_digest(temporary / name) for name in (_STATE, _FACTS)}
    (temporary / _DIGESTS).write_bytes(canonical_json(digests))
    publish(temporary, target)
    for old in _points(root)[_NUM_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def newest_point(folder: Path, job: str) -> ResumePoint | None:
    """Return the newest whole point of this job; None: start from the beginning."""
    root = folder / "resume"
    for path in _points(root) if root.is_dir() else []:
        point = _read(path, job)
        if point is not None:
            return point
    return None


def publish(temporary: Path, target: Path) -> None:
    """Make a finished folder appear under its name, durably and at once."""
    for path in sorted(temporary.iterdir()):
        _sync(path)
    _sync(temporary)
    temporary.rename(target)
    _sync(target.parent)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, job: str) -> ResumePoint | None:
    try:
        digests = read_json((path / _DIGESTS).read_bytes(), _DIGESTS, max_bytes=1 << 12)
        if any(file_digest(path / name) != digests.get(name) for name in (_STATE, _FACTS)):
            return None
        stored = read_json((path / _FACTS).read_bytes(), _FACTS, max_bytes=_MAX_FACTS_BYTES)
        facts, step = stored.get("facts"), stored.get("step")
        if stored.get("job") != job or not isinstance(facts, dict) or not isinstance(step, int):
            return None
        return ResumePoint(step, load_file(path / _STATE), facts)
    except (OSError, StoreError, SafetensorError):
        return None


def _points(root: Path) -> list[Path]:
    """Return the finished points, newest first."""
    return sorted((path for path in root.iterdir() if _POINT.match(path.name) and path.is_dir()), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

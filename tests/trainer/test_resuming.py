"""A run that was interrupted anywhere ends with the same bytes as one that was not.

Owns the interruptions inside one process: the generator is dropped, as a kill leaves it, since all that counts lies in
the folder. Invariant: files of the final adapter, provenance included, are bit-equal.
"""

import json
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from safetensors.torch import load_file, save_file

from adapters_store.jobs.shared_folders import SharedFolders
from adapters_store.strict_json import Json
from serve.trainer.progress import (
    AlwaysRun,
    CheckpointSaved,
    Finished,
    Signal,
    Started,
    StepDone,
    Stopped,
    TrainingFailed,
    TrainingRun,
    Validated,
)
from serve.trainer.train import run
from tests.memory_objects import MemoryObjects
from tests.trainer.tiny_base import Place, files_of, finish

pytestmark = pytest.mark.filterwarnings("ignore")

# every kind of state at once: dropout draws random numbers, packing, validation, the best step, checkpoints
LORA: dict[str, Json] = {
    "rank": 4,
    "dropout": 0.2,
    "target_modules": ["q_proj", "down_proj"],
    "validation_split": 0.2,
    "eval_every": 3,
    "early_stopping": 50,
    "checkpoint_every": 4,
    "max_steps": 9,
}


@dataclass
class At:
    """A control that says something once a number of steps was asked for."""

    step: int
    signal: Signal
    asked: int = 0

    def check(self) -> Signal:
        """Count the steps."""
        self.asked += 1
        return self.signal if self.asked > self.step else "run"


def interrupted(place: Place, name: str, steps: list[int], spec: dict[str, Json]) -> dict[str, bytes]:
    """Run the job, dropping it after so many of its own steps each time, then to the end."""
    for count in steps:
        events = run(place.job(name, **spec), AlwaysRun())
        for event in events:
            if isinstance(event, StepDone) and (count := count - 1) == 0:
                break
        events.close()  # type: ignore[attr-defined]
    return files_of(finish(place.job(name, **spec))[0].adapter)


@pytest.mark.parametrize(
    "spec",
    [
        LORA,
        {"family": "lora", "rank": 2, "init": "pissa", "target_modules": ["v_proj"], "max_steps": 5},
        {"family": "s2ft", "selection": "gradient", "channels": 4, "max_steps": 5},
    ],
    ids=["lora", "pissa", "s2ft"],
)
def test_a_run_that_was_killed_again_and_again_ends_with_the_same_bytes(place: Place, spec: dict[str, Json]) -> None:
    wanted = files_of(finish(place.job("whole", **spec))[0].adapter)
    found = interrupted(place, "cut", [1, 3, 2], spec)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_machines_that_share_only_objects_end_with_the_same_bytes_and_tell_the_same_adapters(place: Place) -> None:
    def told(job: TrainingRun) -> dict[int, dict[str, bytes]]:
        """Run to the end; return the adapters that were told of, by their step; 0: the last one, -1: where it began."""
        final, events = finish(job)
        found = {event.step: files_of(event.adapter) for event in events if isinstance(event, CheckpointSaved)}
        begun = next(event.resumed_step for event in events if isinstance(event, Started))
        return found | {0: files_of(final.adapter), -1: {"step": b"%d" % begun}}

    wanted = told(place.job("whole", **LORA))
    memory, job = MemoryStore(), place.job("cut", **LORA)
    for token in (1, 2, 3):
        with closing(SharedFolders(place.root / f"machine{token}", MemoryObjects(memory))) as machine:
            if token == 1:
                machine.make_job("ftjob-1", {}, {})
            folder = machine.begin_run("ftjob-1", token)
            if token == 3:
                found = told(replace(job, folder=folder))
                continue
            events = run(replace(job, folder=folder), AlwaysRun())
            for event in events:
                machine.share_run("ftjob-1", token)
                if isinstance(event, StepDone) and event.step == 3 * token:
                    break
            events.close()  # type: ignore[attr-defined]
    # with nothing of the machines before but what they had shared
    assert int(found.pop(-1)["step"]) >= 4 and wanted.pop(-1) == {"step": b"0"}
    assert found == wanted


def test_what_is_told_again_after_a_kill_is_told_with_equal_values(place: Place) -> None:
    told: dict[tuple[str, int], list[object]] = {}
    for count in (2, 4, 3, 100):
        for event in run(place.job("cut", **LORA), AlwaysRun()):
            if isinstance(event, StepDone | Validated | CheckpointSaved):
                told.setdefault((type(event).__name__, event.step), []).append(event)
            if isinstance(event, StepDone) and (count := count - 1) == 0:
                break
    assert [step for kind, step in sorted(told) if kind == "StepDone"] == list(range(1, 10))
    assert [step for kind, step in sorted(told) if kind == "CheckpointSaved"] == [4, 8]
    assert all(event == events[0] for events in told.values() for event in events)


def test_a_paused_run_goes_on_and_a_cancelled_one_saves_nothing(place: Place) -> None:
    wanted = files_of(finish(place.job("whole", **LORA))[0].adapter)
    *_, last = run(place.job("cut", **LORA), At(5, "pause"))
    assert last == Stopped(5, "pause")
    first, *_ = run(place.job("cut", **LORA), At(0, "cancel"))
    assert isinstance(first, Started) and first.resumed_step == 5
    assert files_of(finish(place.job("cut", **LORA))[0].adapter) == wanted
    *_, last = run(place.job("new", **LORA), At(0, "cancel"))
    assert last == Stopped(0, "cancel")
    assert not (place.root / "new" / "adapter").exists()


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "digests.json"])
def test_a_tampered_resume_point_is_not_loaded(place: Place, file: str) -> None:
    wanted = files_of(finish(place.job("whole", **LORA))[0].adapter)
    *_, last = run(place.job("cut", **LORA), At(6, "pause"))
    assert last == Stopped(6, "pause")
    newest = place.root / "cut" / "resume" / "step-000000006" / file
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(bytes(raw))
    first, *rest = run(place.job("cut", **LORA), AlwaysRun())
    # the point before it, two are kept
    assert isinstance(first, Started) and first.resumed_step == 5
    assert isinstance(rest[-1], Finished)
    assert files_of(rest[-1].adapter) == wanted


def test_a_point_of_another_job_is_not_loaded(place: Place) -> None:
    finish(place.job("cut", **LORA))
    first, *_ = run(place.job("cut", **{**LORA, "learning_rate": 0.02}), At(0, "cancel"))
    assert isinstance(first, Started) and first.resumed_step == 0


def test_half_a_point_and_half_an_export_are_no_points(place: Place) -> None:
    wanted = files_of(finish(place.job("whole", **LORA))[0].adapter)
    *_, _ = run(place.job("cut", **LORA), At(4, "pause"))
    resume = place.root / "cut" / "resume"
    shutil.copytree(resume / "step-000000004", resume / ".step-000000007.tmp")
    (resume / "step-000000008").mkdir()
    (place.root / "cut" / ".adapter.tmp").mkdir()
    (place.root / "cut" / ".adapter.tmp" / "adapter_model.safetensors").write_bytes(b"half")
    assert files_of(finish(place.job("cut", **LORA))[0].adapter) == wanted


def test_nan_ends_the_job_with_its_cause_and_exports_nothing(place: Place, tmp_path: Path) -> None:
    base = shutil.copytree(place.base, tmp_path / "overflowing")
    weights = load_file(base / "model.safetensors")
    # the last norm's outputs leave float32
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingFailed, match=r"at step 1, .*lower the learning rate") as failure:
        list(run(replace(place.job("wild", rank=4), base=base), AlwaysRun()))
    assert failure.value.code == "nan"
    assert not (place.root / "wild" / "adapter").exists()


def test_early_stopping_ends_at_the_best_step(place: Place) -> None:
    job = place.job(
        "early",
        rank=4,
        learning_rate=0.3,
        validation_split=0.3,
        eval_every=1,
        early_stopping=2,
        max_steps=60,
        n_epochs=50,
    )
    finished, events = finish(job)
    validations = [event for event in events if isinstance(event, Validated)]
    best = min(validations, key=lambda event: event.valid_loss)
    assert len(validations) < 60
    assert [event.step for event in validations][-1] == best.step + 2
    assert finished.metrics["best_step"] == best.step
    provenance = json.loads((finished.adapter / "provenance.json").read_text())
    assert provenance["best_step"] == best.step
    assert provenance["steps"] == validations[-1].step

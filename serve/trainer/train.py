"""The training loop: from a job to an adapter folder, step by step, resumable after a kill at any moment.

Owns the order of the work: load, attach, resume, then step, validate, export, save, tell. Invariant: what the loop
yields after step n is a function of the job alone, however often the process was killed before; what is told again
after a kill is told with equal values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.strict_json import Json
from serve.trainer.checkpoints import ResumePoint, newest_point, save_point
from serve.trainer.data import Data, load_data
from serve.trainer.exporting import export_adapter
from serve.trainer.history import History, points
from serve.trainer.loading import attach, fit_base, load_base, read_base
from serve.trainer.methods.method import Attached, Setting
from serve.trainer.progress import (
    CheckpointSaved,
    Control,
    Finished,
    Progress,
    Retold,
    Signal,
    Started,
    StepDone,
    Stopped,
    TrainingFailed,
    TrainingRun,
    Validated,
)
from serve.trainer.provenance import job_digest, job_facts, thinned
from serve.trainer.schedule import Schedule
from serve.trainer.state import load_state, state_tensors
from serve.trainer.stepping import Stepper
from serve.trainer.world import World

_SIGNALS: tuple[Signal, ...] = ("run", "pause", "cancel")


def run(job: TrainingRun, control: Control) -> Iterator[Progress]:
    """Train the job, or go on where it was killed or paused, and yield what happens.

    Raises:
        TrainingFailed: bad data, a bad base or expert, NaN, out of memory.
    """
    with _memory_failures(job):
        _cap_memory(job)
        training = _Training(job)
        yield from training.run(control)


class _Training:
    """One run: everything that is loaded once, and the history."""

    def __init__(self, job: TrainingRun) -> None:
        base = read_base(job.base)
        job = replace(job, spec=fit_base(job.spec, base))
        data = load_data(job)
        self._data: Data = data
        self._spec = job.spec.resolved(data.summary.num_examples)
        self._job = replace(job, spec=self._spec)
        self._world = World(is_cpu=job.device == "cpu")
        self._schedule = Schedule.of(self._spec, len(data.train))
        self._facts = job_facts(self._job, data, base.dims.weights_fingerprint)
        self._identity = job_digest(self._facts)
        self._attached = self._attach()
        self._stepper = Stepper(self._attached, data, self._spec, job.device, self._world)
        self._history = History()
        # the trained parameters of the best validation, where the job may end early
        self._best: dict[str, Tensor] = {}

    def run(self, control: Control) -> Iterator[Progress]:
        """Yield the run's progress."""
        schedule, history = self._schedule, self._history
        step = self._resume()
        history = self._history
        yield Started(
            total_steps=schedule.total_steps,
            resumed_step=step,
            spec=self._spec,
            num_examples=self._data.summary.num_examples,
            num_valid_examples=len(self._data.valid),
            num_trainable=sum(parameter.numel() for parameter in self._attached.trained().values()),
            num_cut=self._data.num_cut,
        )
        yield from self._tell_again()
        while step < schedule.total_steps and not history.is_ended:
            signal = self._agree(control.check())
            if signal != "run":
                if signal == "pause":
                    self._save(step)
                yield Stopped(step, "pause" if signal == "pause" else "cancel")
                return
            step += 1
            yield from self._one_step(step)
        signal = self._agree(control.check())
        if signal == "cancel":
            yield Stopped(step, "cancel")
            return
        yield self._finish(step)

    def _tell_again(self) -> Iterator[Progress]:
        """Yield what is saved, for a kill may have come between saving and telling."""
        history, schedule = self._history, self._schedule
        for step, loss, accuracy in points(history.curve):
            rate = schedule.learning_rate_at(step - 1)
            yield Retold(StepDone(step, schedule.total_steps, loss, accuracy, history.tokens, rate))
        for step, loss, accuracy in points(history.validations):
            yield Retold(Validated(step, loss, accuracy))
        for saved, metrics in history.saved():
            yield CheckpointSaved(saved, self._folder_of(saved), metrics)

    def _one_step(self, step: int) -> Iterator[Progress]:
        """Take one step and what is due after it; the state is saved before anything of it is told."""
        schedule, history = self._schedule, self._history
        rate = schedule.learning_rate_at(step - 1)
        rows = self._data.rows_of_step(self._spec, schedule, step - 1)
        result = self._stepper.step(rows, schedule.micro_rows, rate, step)
        history.tokens += result.tokens
        history.curve.append([step, result.loss, result.accuracy])
        told: list[Progress] = [
            StepDone(step, schedule.total_steps, result.loss, result.accuracy, history.tokens, rate, result.extra)
        ]
        if self._data.valid and schedule.is_due(schedule.eval_every, step):
            told.append(self._validate(step))
        is_checkpoint = schedule.is_due(schedule.checkpoint_every, step) and step < schedule.total_steps
        if is_checkpoint and not history.is_ended:
            metrics = history.metrics()
            told.append(CheckpointSaved(step, self._export(self._folder_of(step)), metrics))
            history.exports.append([step, {**metrics}])
        if is_checkpoint or schedule.is_due(schedule.resume_every, step) or history.is_ended:
            self._save(step)
        yield from told

    def _validate(self, step: int) -> Validated:
        result = self._stepper.validate()
        patience = self._spec.early_stopping
        if self._history.note_validation(step, result.loss, result.accuracy) and patience is not None:
            self._best = {name: value.detach().clone() for name, value in self._attached.trained().items()}
        self._history.is_ended = patience is not None and self._history.num_worse >= patience
        return Validated(step, result.loss, result.accuracy)

    def _finish(self, step: int) -> Finished:
        """Export the last parameters, or the best where the job may end early."""
        if self._best:
            with torch.no_grad():
                for name, parameter in self._attached.trained().items():
                    parameter.copy_(self._best[name])
        metrics = self._history.metrics()
        if self._best:
            metrics["best_step"] = float(self._history.best_step)
        adapter = self._export(self._job.folder / "adapter")
        return Finished(adapter, metrics, self._history.tokens, self._provenance())

    def _attach(self) -> Attached:
        job, spec = self._job, self._spec
        model = load_base(job.base, spec, job.device)
        setting = Setting(spec, job.experts, job.disjoint_with, self._data.calibration(spec, job.device))
        torch.manual_seed(spec.seed)
        attached = attach(model, setting)
        if spec.gradient_checkpointing:
            enable = getattr(attached.model, "gradient_checkpointing_enable", None)
            if enable is None:
                raise TrainingFailed("bad_spec", "this base has no gradient checkpointing")
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # dropout draws from here on
        torch.manual_seed(spec.seed)
        return attached

    def _resume(self) -> int:
        """Load the newest resume point of this job; return its step, 0 without one."""
        point = newest_point(self._job.folder, self._identity)
        if point is None:
            return 0
        self._best = load_state(point.tensors, self._attached, self._stepper.optimizer)
        self._history = History.of({**point.facts})
        return point.step

    def _save(self, step: int) -> None:
        if self._world.is_first:
            tensors = state_tensors(self._attached, self._stepper.optimizer, self._best)
            save_point(self._job.folder, ResumePoint(step, tensors, self._history.facts()), self._identity)
        self._world.wait()

    def _export(self, target: Path) -> Path:
        if self._world.is_first:
            export_adapter(self._attached, target, self._provenance())
        self._world.wait()
        return target

    def _folder_of(self, step: int) -> Path:
        return self._job.folder / "checkpoints" / f"step-{step}"

    def _provenance(self) -> dict[str, Json]:
        return {
            **self._facts,
            "steps": len(self._history.curve),
            "trained_tokens": self._history.tokens,
            "loss_curve": thinned(self._history.curve),
            "validations": thinned(self._history.validations),
            "best_step": self._history.best_step,
        }

    def _agree(self, signal: Signal) -> Signal:
        """Return the first process's signal in all of them."""
        own = float(_SIGNALS.index(signal)) if self._world.is_first else 0.0
        return _SIGNALS[int(self._world.sum_numbers([own], self._job.device)[0])]


def _cap_memory(job: TrainingRun) -> None:
    """Bound what this process takes of its CUDA device; raises TrainingFailed when the cap exceeds the device."""
    if job.memory_cap_bytes is None or not job.device.startswith("cuda"):
        return
    total = torch.cuda.get_device_properties(job.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_cap_bytes / total), job.device)


@contextmanager
def _memory_failures(job: TrainingRun) -> Iterator[None]:
    """Turn running out of memory, the device's or the process's, into TrainingFailed."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingFailed("oom", _out_of_memory(job)) from error
    except RuntimeError as error:
        # torch's CPU allocator has no class of its own
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise TrainingFailed("oom", _out_of_memory(job)) from error


def _out_of_memory(job: TrainingRun) -> str:
    cap = "" if job.memory_cap_bytes is None else f" of {job.memory_cap_bytes} bytes"
    return (
        f"the job needs more memory than its share{cap}: lower batch_size or max_length, or set "
        f"gradient_checkpointing; batch_size is {job.spec.batch_size}, max_length {job.spec.max_length}"
    )

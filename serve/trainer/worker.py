"""A training worker: claims jobs, runs each in a walled process, reports, hands over; knows no registry and no tenant.

Owns the life of one claim. Invariants: it writes nothing about a job without its fencing token; when `run` returns, no
training process is left, and a job that it held can be claimed at once; a worker that dies leaves one whose lease runs
out.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.convert.sandbox import LAYERS
from adapters_store.errors import StorageFailed, StoreError, StoreFull
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import Claim, JobError, Trained
from adapters_store.jobs.job_errors import LeaseLost
from adapters_store.jobs.jobs import JobQueue
from serve.trainer.child import Child, Launch
from serve.trainer.progress import CheckpointSaved, Finished, StepDone, Stopped, TrainingFailed, Validated
from serve.trainer.telling import Telling
from serve.trainer.wire import Begun, BrokenChild, RunRequest, WallsMissing, decode

logger = logging.getLogger(__name__)

# how often the worker looks up: at commands, at its lease, at what is to be written
_TICK_S = 0.25
_PAUSE_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What every job of a worker has in common.

    `lease_s` is how long a dead worker's job waits; None of the memory bounds: what the machine has.
    """

    name: str
    base: Path
    base_fingerprint: str
    device: str = "cpu"
    num_threads: int = 1
    lease_s: float = 30.0
    poll_s: float = 0.5
    max_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    max_seconds: int = 7 * 24 * 3600
    code_version: str = ""
    # signs what a job leaves, before it is handed over; None: nothing is signed
    sign: Callable[[Path], None] | None = None


class Worker:
    """One worker. `stop` may be called from a signal handler or another thread."""

    def __init__(self, config: WorkerConfig, queue: JobQueue, folders: TrainingFolders, launch: Launch) -> None:
        self._config = config
        self._queue = queue
        self._folders = folders
        self._launch = launch
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after the current step; the job in hand goes back to the queue with what it has saved."""
        self._stopping.set()

    def run(self, *, is_orphaned: Callable[[], bool] = lambda: False) -> None:
        """Work until `stop`, or until nobody is left to work for; raises StoreError if the store cannot be used."""
        while not self._stopping.is_set() and not is_orphaned():
            if not self.run_one():
                self._stopping.wait(self._config.poll_s)

    def run_one(self) -> bool:
        """Train the next job, if there is one; return whether there was."""
        claim = self._queue.claim(self._config.name, self._config.base_fingerprint, lease_s=self._config.lease_s)
        if claim is None:
            return False
        logger.info("job %s: claimed with token %d", claim.job.id, claim.token)
        try:
            _Attempt(self._config, self._queue, self._folders, claim, self._stopping).run(self._launch)
        except LeaseLost as lost:
            logger.warning("job %s: %s", claim.job.id, lost.message)
        return True


class _Attempt:
    """One claim from its run's folder to its end."""

    def __init__(
        self,
        config: WorkerConfig,
        queue: JobQueue,
        folders: TrainingFolders,
        claim: Claim,
        stopping: threading.Event,
    ) -> None:
        self._config = config
        self._queue = queue
        self._folders = folders
        self._claim = claim
        self._stopping = stopping
        self._telling = Telling()
        self._renew_at = 0.0

    def run(self, launch: Launch) -> None:
        """Train and report; raises LeaseLost when the job is another's, paused or cancelled."""
        job_id = self._claim.job.id
        try:
            folder = self._folders.begin_run(job_id, self._claim.token)
            child = launch(self._request(folder))
        except (OSError, StoreError) as error:
            logger.exception("job %s: cannot start", job_id)
            self._queue.fail(
                self._claim, JobError("storage_error", f"the job's folder cannot be used: {type(error).__name__}")
            )
            return
        try:
            self._follow(child)
        except LeaseLost:
            # a paused job keeps what it can still save; its folder is renamed before anybody else trains there
            child.ask("pause" if self._queue.is_paused(job_id) else "cancel")
            child.wait(_PAUSE_GRACE_S)
            raise
        finally:
            child.close()

    def _request(self, folder: Path) -> RunRequest:
        config, job = self._config, self._claim.job
        return RunRequest(
            base=str(config.base),
            inputs=str(self._folders.inputs(job.id)),
            folder=str(folder),
            spec=dict(job.new.spec),
            device=config.device,
            num_threads=config.num_threads,
            max_memory_bytes=config.max_memory_bytes,
            device_memory_bytes=config.device_memory_bytes,
            max_seconds=config.max_seconds,
            code_version=config.code_version,
            parent="",
        )

    def _follow(self, child: Child) -> None:
        """Listen until the process has said its last word."""
        has_asked = False
        while True:
            if self._stopping.is_set() and not has_asked:
                child.ask("pause")
                has_asked = True
            try:
                lines = child.read(_TICK_S)
                if lines is None:
                    self._lost(child)
                    return
                for line in lines:
                    if self._hear(line):
                        return
            except TrainingFailed as failure:
                self._write()
                self._queue.fail(self._claim, JobError(failure.code, failure.message))
                return
            except (BrokenChild, StorageFailed, StoreFull) as error:
                logger.exception("job %s: given up", self._claim.job.id)
                message = error.message if isinstance(error, StoreError) else "the training process broke its protocol"
                self._queue.fail(self._claim, JobError("trainer_error", message))
                return
            self._write()

    def _hear(self, line: bytes) -> bool:
        """Take one message; return whether it was the last."""
        heard, telling = decode(line), self._telling
        if isinstance(heard, WallsMissing):
            for layer in heard.layers:
                logger.warning("training without %s: %s", layer, LAYERS.get(layer, "unknown"))
        elif isinstance(heard, Begun):
            telling.begun(heard)
        elif isinstance(heard, StepDone):
            telling.stepped(heard)
        elif isinstance(heard, Validated):
            telling.validated(heard)
        elif isinstance(heard, CheckpointSaved):
            self._write()
            export = self._keep(heard.adapter, f"step-{heard.step}")
            self._queue.add_checkpoint(self._claim, heard.step, export, dict(heard.metrics))
        elif isinstance(heard, Stopped):
            self._write()
            self._queue.give_back(self._claim)
            return True
        else:
            self._write()
            self._hand_over(heard)
            return True
        return False

    def _hand_over(self, finished: Finished) -> None:
        export = self._keep(finished.adapter, "final")
        provenance = json.loads((self._folders.job(self._claim.job.id) / export / "provenance.json").read_bytes())
        trained = Trained(export, dict(finished.metrics), finished.trained_tokens, provenance)
        self._queue.hand_over(self._claim, trained)
        logger.info("job %s: trained", self._claim.job.id)

    def _keep(self, adapter: Path, name: str) -> str:
        """Copy an export out of the run; what the walled process named must lie in its own folder."""
        folder = self._folders.job(self._claim.job.id) / f"run-{self._claim.token}"
        if not adapter.is_relative_to(folder) or ".." in adapter.parts:
            raise BrokenChild("an adapter outside of the run's folder")
        # the token in the name: what a void claim leaves is never taken for a good one's
        export = self._folders.keep_export(self._claim.job.id, f"{name}.{self._claim.token}", adapter)
        if self._config.sign is not None:
            self._config.sign(self._folders.job(self._claim.job.id) / export)
        return export

    def _write(self) -> None:
        """Write what was noted and renew the lease when a third of it is over; raises LeaseLost."""
        events, progress = self._telling.take()
        now = time.monotonic()
        if now >= self._renew_at:
            self._queue.renew(self._claim, lease_s=self._config.lease_s)
            self._renew_at = now + self._config.lease_s / 3
        elif not events:
            self._queue.check(self._claim)
        if events or progress is not None:
            self._queue.report(self._claim, events, progress)

    def _lost(self, child: Child) -> None:
        """The process ended without a last word: killed, or broken."""
        status = child.close()
        logger.error("job %s: the training process ended with status %d", self._claim.job.id, status)
        self._write()
        if status < 0:
            # killed from outside, or for its memory: as a dead worker's job, it gets a few more tries
            self._queue.give_back(self._claim, was_lost=True)
        else:
            self._queue.fail(
                self._claim, JobError("trainer_error", "the training process failed unexpectedly; see the worker's log")
            )

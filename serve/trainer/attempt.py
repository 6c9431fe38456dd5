"""One claim of a job, from its run's folder to its end: in a walled process, reported, handed over.

Owns the life of the claim. Invariants: nothing is written about a job without its fencing token; when `run` returns, no
training process is left; while an object store is away the job waits, and nothing that was told is lost; what takes
long does not cost the lease.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from adapters_store.convert.sandbox import LAYERS
from adapters_store.errors import StorageFailed, StoreAway, StoreError, StoreFull
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import Claim, JobError, Trained
from adapters_store.jobs.job_errors import LeaseLost
from adapters_store.jobs.jobs import JobQueue
from serve.trainer.child import Child, Launch
from serve.trainer.progress import CheckpointSaved, Finished, StepDone, Stopped, TrainingFailed, Validated
from serve.trainer.telling import Telling
from serve.trainer.wire import Begun, BrokenChild, RunRequest, WallsMissing, decode

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# how often the worker looks up: at commands, at its lease, at what is to be written
_TICK_S = 0.25
_PAUSE_GRACE_S = 30.0
# between two tries at an object store that is away
_AWAY_S = 1.0


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


class Attempt:
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
        # what could not be shared of the run was said once
        self._has_complained = False

    def run(self, launch: Launch) -> None:
        """Train and report; raises LeaseLost when the job is another's, paused or cancelled."""
        job_id = self._claim.job.id
        try:
            child = self._begun(launch)
            if child is not None:
                self._watch(child)
        finally:
            self._folders.leave_job(job_id)

    def _begun(self, launch: Launch) -> Child | None:
        """Start the training process; None: it cannot be started, and the job has failed."""
        job_id = self._claim.job.id
        try:
            folder = self._holding(lambda: self._folders.begin_run(job_id, self._claim.token))
            return launch(self._request(folder))
        except (LeaseLost, StoreAway):
            raise
        except (OSError, StoreError) as error:
            logger.exception("job %s: cannot start", job_id)
            self._fail(JobError("storage_error", f"the job's folder cannot be used: {type(error).__name__}"))
            return None

    def _watch(self, child: Child) -> None:
        job_id = self._claim.job.id
        try:
            self._follow(child)
        except LeaseLost:
            # a paused job keeps what it can still save; nobody else trains in its folder
            is_paused = self._patiently(lambda: self._queue.is_paused(job_id))
            child.ask("pause" if is_paused else "cancel")
            child.wait(_PAUSE_GRACE_S)
            if is_paused:
                with suppress(StoreError):
                    self._folders.share_run(job_id, self._claim.token)
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
                self._fail(JobError(failure.code, failure.message))
                return
            except StoreAway:
                # it was asked to stop meanwhile: the lease runs out, and another worker goes on
                raise
            except (BrokenChild, StorageFailed, StoreFull) as error:
                logger.exception("job %s: given up", self._claim.job.id)
                message = error.message if isinstance(error, StoreError) else "the training process broke its protocol"
                self._fail(JobError("trainer_error", message))
                return
            self._write()
            self._share()

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
            add = partial(self._queue.add_checkpoint, self._claim, heard.step, export, dict(heard.metrics))
            self._patiently(add)
        elif isinstance(heard, Stopped):
            self._write()
            self._share()
            self._patiently(lambda: self._queue.give_back(self._claim))
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
        self._patiently(lambda: self._queue.hand_over(self._claim, trained))
        logger.info("job %s: trained", self._claim.job.id)

    def _keep(self, adapter: Path, name: str) -> str:
        """Copy an export out of the run; what the walled process named must lie in its own folder."""
        job_id = self._claim.job.id
        folder = self._folders.job(job_id) / f"run-{self._claim.token}"
        if not adapter.is_relative_to(folder) or ".." in adapter.parts:
            raise BrokenChild("an adapter outside of the run's folder")
        # the token in the name: what a void claim leaves is never taken for a good one's
        export = self._folders.keep_export(job_id, f"{name}.{self._claim.token}", adapter)
        if self._config.sign is not None:
            self._config.sign(self._folders.job(job_id) / export)
        self._holding(lambda: self._folders.share_export(job_id, export))
        return export

    def _share(self) -> None:
        """See that what the run has saved outlives this machine; it is tried again with what is saved next."""
        job_id, token = self._claim.job.id, self._claim.token
        if self._folders.is_run_shared(job_id, token):
            return
        try:
            self._holding(lambda: self._folders.share_run(job_id, token))
        except (LeaseLost, StoreAway):
            raise
        except StoreError as error:
            if not self._has_complained:
                logger.warning("job %s: what it saved was not shared: %s", job_id, error.message)
            self._has_complained = True

    def _write(self) -> None:
        """Write what was noted and renew the lease when a third of it is over; raises LeaseLost."""
        events, progress = self._telling.take()
        if not self._renewed() and not events:
            self._patiently(lambda: self._queue.check(self._claim))
        if events or progress is not None:
            self._patiently(lambda: self._queue.report(self._claim, events, progress))

    def _renewed(self) -> bool:
        """Renew the lease when a third of it is over, and say whether that was done; raises LeaseLost."""
        now = time.monotonic()
        if now < self._renew_at:
            return False
        self._patiently(lambda: self._queue.renew(self._claim, lease_s=self._config.lease_s))
        self._renew_at = now + self._config.lease_s / 3
        return True

    def _fail(self, error: JobError) -> None:
        self._patiently(lambda: self._queue.fail(self._claim, error))

    def _holding(self, call: Callable[[], Answer]) -> Answer:
        """Make a call that may take long, and keep the lease meanwhile; raises LeaseLost, what the call raises."""
        with ThreadPoolExecutor(1, "training-files") as thread:
            future = thread.submit(self._patiently, call)
            while not wait([future], timeout=_TICK_S).done:
                self._renewed()
            return future.result()

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """Make a call again until the object store answers; raises StoreAway if the worker is to stop meanwhile."""
        was_away = False
        while True:
            try:
                return call()
            except StoreAway as away:
                if not was_away:
                    logger.warning("job %s: waiting: %s", self._claim.job.id, away.message)
                was_away = True
                if self._stopping.wait(_AWAY_S):
                    raise

    def _lost(self, child: Child) -> None:
        """The process ended without a last word: killed, or broken."""
        status = child.close()
        logger.error("job %s: the training process ended with status %d", self._claim.job.id, status)
        self._write()
        if status < 0:
            # killed from outside, or for its memory: as a dead worker's job, it gets a few more tries
            self._patiently(lambda: self._queue.give_back(self._claim, was_lost=True))
        else:
            self._fail(JobError("trainer_error", "the training process failed unexpectedly; see the worker's log"))

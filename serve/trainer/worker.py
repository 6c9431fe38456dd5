"""A training worker: claims one job after the other and has each run (`attempt.py`); knows no registry and no tenant.

Owns the worker's life. Invariants: when `run` returns, no training process is left, and a job that it held can be
claimed at once; a worker that dies leaves one whose lease runs out; an object store that is away ends no worker.
"""

import logging
import threading
from collections.abc import Callable

from adapters_store.errors import StoreAway
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job_errors import LeaseLost
from adapters_store.jobs.jobs import JobQueue
from serve.trainer.attempt import Attempt, WorkerConfig
from serve.trainer.child import Launch

logger = logging.getLogger(__name__)


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
        was_away = False
        while not self._stopping.is_set() and not is_orphaned():
            try:
                has_worked, is_away = self.run_one(), False
            except StoreAway as error:
                has_worked, is_away = False, True
                if not was_away:
                    logger.warning("waiting for jobs: %s", error.message)
            was_away = is_away
            if not has_worked:
                self._stopping.wait(self._config.poll_s)

    def run_one(self) -> bool:
        """Train the next job, if there is one; return whether there was."""
        claim = self._queue.claim(self._config.name, self._config.base_fingerprint, lease_s=self._config.lease_s)
        if claim is None:
            return False
        logger.info("job %s: claimed with token %d", claim.job.id, claim.token)
        try:
            Attempt(self._config, self._queue, self._folders, claim, self._stopping).run(self._launch)
        except LeaseLost as lost:
            logger.warning("job %s: %s", claim.job.id, lost.message)
        return True

"""The training worker that runs beside a server: started, started again when it dies, ended with the server.

Owns that process. Invariant: when the `with` block is left the worker is gone; it got SIGTERM and time to save first,
and one that the server could not end (the server was killed) ends by itself when it sees that it has no parent.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.cli.train_options import TrainWorker
from serve.config import ServeConfig
from serve.trainer.starting import check_extra

logger = logging.getLogger(__name__)

_STOP_S = 40.0
_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
# one that lived so long did not die of its start
_HEALTHY_S = 60.0


def run_beside(train_worker: TrainWorker, config: ServeConfig, run_server: Callable[[], None]) -> None:
    """Run the server, with a training worker beside it if it is wanted; raises as the server, and StartError."""
    if train_worker is TrainWorker.OFF:
        run_server()
        return
    with training_beside(config.api.store_dir, config.engine.model_dir, config.api.blobs_url):
        run_server()


@contextmanager
def training_beside(store_dir: Path, model_dir: Path, blobs_url: str | None = None) -> Iterator[None]:
    """Keep a worker running for as long as the block does.

    Raises:
        StartError: the packages that training needs are not installed.
    """
    check_extra()
    command = [sys.executable, "-m", "serve", "train-worker", "--store", str(store_dir), "--model", str(model_dir)]
    if blobs_url is not None:
        command += ["--blobs", blobs_url]
    level = logging.getLevelName(logging.getLogger().level).lower()
    sidecar = _Sidecar([*command, "--log-level", level])
    thread = threading.Thread(target=sidecar.keep_running, name="train worker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sidecar.stop()
        thread.join()


class _Sidecar:
    """One worker process after another; `keep_running` is a thread's."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def keep_running(self) -> None:
        """Start the worker again and again until `stop`."""
        backoff_s = _BACKOFF_S
        while (process := self._start()) is not None:
            try:
                status = process.wait(_HEALTHY_S)
            except subprocess.TimeoutExpired:
                backoff_s = _BACKOFF_S
                status = process.wait()
            if self._stopping.is_set():
                return
            logger.error("the train worker ended with status %d; another one starts in %g s", status, backoff_s)
            self._stopping.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def stop(self) -> None:
        """End the worker: it saves what it trains, and is killed if that takes too long."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            # its training process dies with it
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                # stdout carries the server's ready line alone
                stdout=sys.stderr,
                env=dict(os.environ),
                # Ctrl-C reaches the server, which ends the worker in order
                start_new_session=True,
            )
            return self._process

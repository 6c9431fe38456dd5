"""A worker over a store's folder: what it needs of base and machine, opened and checked.

Owns the defaults that depend on the machine. Invariant: a worker that cannot train says so before it claims anything.
"""

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from adapters_store.jobs.queue_sqlite import SqliteJobQueue
from adapters_store.jobs.rows_choice import is_store, open_folders, open_rows
from serve.errors import StartError
from serve.model.spec import read_spec
from serve.trainer.attempt import WorkerConfig
from serve.trainer.child import child_environment, spawn_child
from serve.trainer.worker import Worker

_NEEDED = ("transformers", "peft", "accelerate", "safetensors")
_STORE_POLL_S = 0.1


def check_extra() -> None:
    """Raise StartError if the packages that training needs are not installed; imports none of them."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StartError(f"training needs {', '.join(missing)}: pip install 'chorale[train]'")


def default_threads() -> int:
    """Return half of the cores that this process may use: the other half serves."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def machine_memory_bytes() -> int:
    """Return the machine's memory, and room for what libraries map without using it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + (8 << 30)


def worker_config(
    base: Path,
    *,
    device: str,
    num_threads: int | None,
    lease_s: float,
    max_memory_bytes: int | None,
    device_memory_bytes: int | None,
    code_version: str,
) -> WorkerConfig:
    """Return a worker's configuration; raises StartError if the base cannot be read."""
    return WorkerConfig(
        name=f"{socket.gethostname()}:{os.getpid()}",
        base=base,
        base_fingerprint=read_spec(base).dims.weights_fingerprint,
        device=device,
        num_threads=num_threads or default_threads(),
        lease_s=lease_s,
        max_memory_bytes=max_memory_bytes or machine_memory_bytes(),
        device_memory_bytes=device_memory_bytes,
        code_version=code_version,
    )


def wait_for_store(store_dir: Path, *, is_orphaned: Callable[[], bool]) -> bool:
    """Return once a server has made a store of the folder, and so decided where its jobs lie; False: orphaned."""
    while not is_store(store_dir):
        if is_orphaned():
            return False
        time.sleep(_STORE_POLL_S)
    return True


@contextmanager
def open_worker(store_dir: Path, config: WorkerConfig, blobs_url: str | None = None) -> Iterator[Worker]:
    """Open a store's jobs for one worker, in its folder or in the object store of this URL; raises StoreError."""
    with closing(open_rows(store_dir, time.time, blobs_url)) as rows:
        launch = partial(spawn_child, environment=child_environment(config.num_threads))
        with closing(open_folders(store_dir, blobs_url)) as folders:
            yield Worker(config, SqliteJobQueue(rows), folders, launch)

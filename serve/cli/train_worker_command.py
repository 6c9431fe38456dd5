"""`chorale train-worker`: a process beside the server that trains its jobs.

Owns flags, signals and priority. Invariant: SIGTERM or SIGINT ends it after the current step, and the job in hand can
be resumed by another worker at once.
"""

import os
import signal
from dataclasses import replace

import typer

from adapters_store.priority import step_back
from serve.cli import options
from serve.cli.blob_options import BlobsUrl
from serve.cli.operator_errors import one_line_errors
from serve.cli.serve_command import start_logging
from serve.cli.signing_extra import signer_of_exports
from serve.cli.train_options import DeviceMemory, LeaseS, MaxMemory, Nice, SigningKey, Threads, TrainDevice
from serve.cli.version import installed_version
from serve.model.download import resolve_model_dir
from serve.trainer.starting import check_extra, open_worker, wait_for_store, worker_config


def train_worker(
    store: options.Store,
    model: options.Model,
    blobs_url: BlobsUrl = None,
    device: TrainDevice = "cpu",
    num_threads: Threads = None,
    lease_s: LeaseS = 30.0,
    nice: Nice = 10,
    max_memory_bytes: MaxMemory = None,
    device_memory_bytes: DeviceMemory = None,
    signing_key: SigningKey = None,
    log_level: options.LogLevelOption = options.LogLevel.INFO,
) -> None:
    """Train the fine-tuning jobs of a store, one at a time."""
    start_logging(log_level)
    with one_line_errors(exit_status=2):
        check_extra()
        base = resolve_model_dir(model).absolute()
        config = worker_config(
            base,
            device=device,
            num_threads=num_threads,
            lease_s=lease_s,
            max_memory_bytes=max_memory_bytes,
            device_memory_bytes=device_memory_bytes,
            code_version=installed_version(),
        )
        if signing_key is not None:
            config = replace(config, sign=signer_of_exports(signing_key))
        step_back(nice)
        parent = os.getppid()

        def is_orphaned() -> bool:
            # started by a server, it ends with it, also when that was killed
            return os.getppid() != parent

        # in an object store jobs lie in one place, whoever comes first
        if blobs_url is None and not wait_for_store(store.absolute(), is_orphaned=is_orphaned):
            return
        with open_worker(store.absolute(), config, blobs_url) as worker:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: worker.stop())
            typer.echo(f"chorale train-worker ready {config.name}")
            worker.run(is_orphaned=is_orphaned)

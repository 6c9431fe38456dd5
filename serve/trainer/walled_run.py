"""The inside of a training process: walls up, then the loop, telling each step on one descriptor.

Owns the order: die with the worker, import, confine, train. Invariant: no byte of a tenant's data or adapters is read
before the walls stand; the process reads the base, the job's inputs and code, writes the run's folder, opens no socket
and starts no process.
"""

import os
import select
import signal
from pathlib import Path

import torch

import serve
from adapters_store.convert.kernel_calls import prctl
from adapters_store.convert.sandbox import Limits, confine
from serve.trainer.progress import Signal, TrainingFailed
from serve.trainer.train import run
from serve.trainer.wire import RunRequest, encode, encode_failure, encode_missing

_PARENT_DEATH_SIGNAL = 1
_MAX_OPEN_FILES = 256
_MAX_FILE_BYTES = 64 << 30
# beyond all that a job may ask for; the real bound is the machine's, given by the operator
_NO_BOUND_BYTES = 1 << 46
_SIGNALS: tuple[Signal, ...] = ("run", "pause", "cancel")


class _Commands:
    """What the worker asks of the loop: the last whole line; a closed descriptor means that the worker is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._signal: Signal = "run"

    def check(self) -> Signal:
        """Return the newest wish, without waiting."""
        while select.select([self._descriptor], [], [], 0)[0]:
            said = os.read(self._descriptor, 64)
            if not said:
                return "cancel"
            word = said.decode("ascii", "replace").split()[-1]
            self._signal = next((known for known in _SIGNALS if known == word), self._signal)
        return self._signal


def die_with(parent: int) -> None:
    """Let the kernel end this process when its worker ends; ends it now if that has happened already."""
    prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def train_inside(request: RunRequest, commands: int, messages: int) -> None:
    """Confine this process and train; what happens is written to `messages` line by line.

    Raises:
        OSError: a wall could not be set up, or the worker does not listen any more.
    """
    os.chdir(request.folder)
    torch.set_num_threads(request.num_threads)
    _learn_processor()
    readable = [Path(request.base), Path(request.inputs), Path(serve.__file__).resolve().parent]
    is_cpu = request.device == "cpu"
    limits = Limits(
        # a CUDA context maps the whole device and more
        max_memory_bytes=(request.max_memory_bytes or _NO_BOUND_BYTES) if is_cpu else _NO_BOUND_BYTES,
        max_file_bytes=_MAX_FILE_BYTES,
        cpu_seconds=request.max_seconds * max(1, request.num_threads),
        max_open_files=_MAX_OPEN_FILES,
        may_compute=True,
    )
    missing = confine(limits, readable=readable, writable=Path(request.folder))
    if missing:
        _write(messages, encode_missing(missing))
    try:
        for progress in run(request.run(), _Commands(commands)):
            _write(messages, encode(progress))
    except TrainingFailed as failure:
        _write(messages, encode_failure(failure))


def _learn_processor() -> None:
    """Let torch read what the processor can do; inside the walls there is no /proc."""
    for dtype in (torch.float32, torch.bfloat16):
        torch.mm(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype))


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]

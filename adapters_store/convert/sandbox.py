"""The walls around a process that reads foreign files or trains on them: it sets them up itself, before the first
foreign byte.

Owns the order of the layers: resource limits, no_new_privs, Landlock, another user and no capabilities, seccomp.
Invariant: when `confine` returns, every layer that this kernel offers holds for the rest of the process, and the layers
that it does not offer are named; a layer that is offered and cannot be set up raises instead.
"""

import os
import resource
import struct
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters_store.convert.kernel_calls import prctl, syscall
from adapters_store.convert.landlock import restrict_files
from adapters_store.convert.seccomp import refuse_calls
from adapters_store.priority import step_back

# what a layer's absence means, for the server's log; the keys are what `confine` returns
LAYERS = {
    "landlock": "the kernel has no Landlock (Linux 5.13), so file permissions alone say what a converter may read",
    "seccomp": "no seccomp filter for this kernel or processor, so a converter could open sockets and start processes",
    "user": "the server runs as root in folders that are closed to others, so its converters stay root, though without "
    "capabilities; run it as an ordinary user",
}

_SET_NO_NEW_PRIVS, _SET_DUMPABLE = 38, 4
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_VERSION_3 = 0x20080522
_NOBODY = 65534
# an upload takes what the server's steps leave, and a part of what they want
_NICENESS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process may use: bytes of address space, of its largest file, and seconds of processor time.

    `may_compute` is for a process that trains: it may have threads of its own, and folders in what it may write.
    """

    max_memory_bytes: int
    max_file_bytes: int
    cpu_seconds: int
    max_open_files: int = 32
    may_compute: bool = False


def confine(limits: Limits, *, readable: Iterable[Path], writable: Path) -> tuple[str, ...]:
    """Confine this process for good.

    It keeps reading the folders `readable` and Python's own library, writing `writable`, and its open descriptors.

    Returns:
        The keys of `LAYERS` that do not hold here.
    Raises:
        OSError: a folder is missing, or a layer failed; the process must then end without reading anything foreign.
    """
    folders = [path.resolve(strict=True) for path in readable]
    target = writable.resolve(strict=True)
    if not limits.may_compute:
        # one that trains has been told its priority already
        step_back(_NICENESS)
    _limit(limits)
    prctl(_SET_NO_NEW_PRIVS, 1)
    # no other process of the same user may attach to it or read its memory
    prctl(_SET_DUMPABLE, 0)
    folders += _code_folders()
    has_landlock = restrict_files(folders, [target], may_make_folders=limits.may_compute)
    is_root = os.geteuid() == 0 and not become_nobody([*folders, target], target)
    _drop_capabilities()
    holds = {"landlock": has_landlock, "seccomp": refuse_calls(may_thread=limits.may_compute), "user": not is_root}
    return tuple(layer for layer in LAYERS if not holds[layer])


def _limit(limits: Limits) -> None:
    limited = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.max_file_bytes),
        (resource.RLIMIT_AS, limits.max_memory_bytes),
        (resource.RLIMIT_NOFILE, limits.max_open_files),
    ]
    if not limits.may_compute:
        # counts threads, too
        limited.append((resource.RLIMIT_NPROC, 0))
    for kind, value in limited:
        resource.setrlimit(kind, (value, value))


def _code_folders() -> Iterator[Path]:
    """Yield what imports may still read: Python's library, the installed packages, and this package itself."""
    yield Path(__file__).resolve().parents[1]
    paths = sysconfig.get_paths()
    for name in sorted({paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}):
        if os.path.isdir(name):
            yield Path(name).resolve()


def become_nobody(readable: list[Path], writable: Path) -> bool:
    """Give up root for a user who owns nothing, if that user may use the folders; returns whether it did."""
    # what is tried here can be undone: the saved user is still root
    with suppress(PermissionError):
        os.setgroups([])
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
    may_read = all(_may_read(path) for path in readable)
    may_write = os.access(writable, os.W_OK, effective_ids=True)
    os.seteuid(0)
    os.setegid(0)
    if not (may_read and may_write):
        return False
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    return True


def _may_read(folder: Path) -> bool:
    if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        return False
    return all(os.access(entry.path, os.R_OK, effective_ids=True) for entry in os.scandir(folder))


def _drop_capabilities() -> None:
    """Give up every capability; root without them is bound by the modes of files as everybody else."""
    number = _CAPSET.get(os.uname().machine)
    if number is not None:
        header = struct.pack("=Ii", _CAPABILITIES_VERSION_3, 0)
        syscall(number, header, struct.pack("=6I", 0, 0, 0, 0, 0, 0))

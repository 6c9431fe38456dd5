"""What a converter that a hostile file has taken over might try, from inside its walls.

`python -m tests.store.sandbox_attacks SOURCE TARGET OUTSIDE NAME`: confines itself, then runs attacks and prints what
each of them met, as JSON. Invariant: every attack succeeds without the walls, or the test that it passes is worthless;
`--free` as NAME's prefix leaves the walls away to show it, `--train` takes those of a training process.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adapters_store.convert.sandbox import Limits, confine

LIMITS = Limits(max_memory_bytes=512 << 20, max_file_bytes=1 << 20, cpu_seconds=1)
# attaches without stopping; an attack that stopped its parent would stop the test
PTRACE_SEIZE = 0x4206
PTRACE, PIDFD_OPEN, IO_URING_SETUP = {"x86_64": (101, 434, 425), "aarch64": (117, 434, 425)}[os.uname().machine]


def main(arguments: list[str]) -> None:
    """Run one attack, or all that do not end the process."""
    source, target, outside = (Path(path) for path in arguments[:3])
    name = arguments[3]
    missing: tuple[str, ...] = ()
    parent = os.getppid()
    if not name.startswith("--free"):
        limits = replace(LIMITS, may_compute=name.startswith("--train"))
        missing = confine(limits, readable=[source], writable=target)
    attacks = {**_calls(parent), **_files(source, target, outside)}
    found = {each: _outcome(attack) for each, attack in attacks.items()} if name.endswith("all") else {}
    if name in DEADLY:
        found[name] = _outcome(lambda: DEADLY[name](target))
    print(json.dumps({"missing": missing, "met": found}))


def _outcome(attack: Callable[[], object]) -> str:
    try:
        attack()
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        return type(error).__name__
    return "succeeded"


def _calls(parent: int) -> dict[str, Callable[[], object]]:
    """Sockets, processes, other processes, limits."""
    return {
        "tcp_socket": lambda: socket.socket(socket.AF_INET).close(),
        "unix_socket": lambda: socket.socket(socket.AF_UNIX).close(),
        "netlink_socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "socket_pair": lambda: socket.socketpair()[0].close(),
        "fork": _fork,
        "thread": lambda: threading.Thread(target=int).start(),
        "spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "signal_parent": lambda: os.kill(parent, 0),
        "signal_group": lambda: os.kill(0, signal.SIGCONT),
        "trace_parent": lambda: _raw(PTRACE, PTRACE_SEIZE, parent, 0, 0),
        "pin_parent": lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)),
        "pin_itself": lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
        "renice_parent": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
        "pidfd_parent": lambda: os.close(_raw(PIDFD_OPEN, parent, 0)),
        "io_uring": lambda: os.close(_raw(IO_URING_SETUP, 1, ctypes.create_string_buffer(120))),
        "raise_limit": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)),
        "own_signal": lambda: os.kill(os.getpid(), 0),
    }


def _files(source: Path, target: Path, outside: Path) -> dict[str, Callable[[], object]]:
    """Files inside and outside of what it was given."""
    return {
        "read_source": lambda: (source / "given").read_bytes(),
        "read_link_of_source": lambda: (source / "linked").read_bytes(),
        "write_source": lambda: (source / "given").write_bytes(b"changed"),
        "add_to_source": lambda: (source / "new").write_bytes(b""),
        "write_target": lambda: (target / "made").write_bytes(b"mine"),
        "read_back_target": lambda: (target / "made").read_bytes(),
        "open_own_to_all": lambda: (target / "made").chmod(0o777),
        "remove_in_target": lambda: (target / "made").unlink(),
        "read_secret": lambda: (outside / "secret").read_bytes(),
        "close_outside": lambda: (outside / "secret").chmod(0o777),
        "take_outside": lambda: os.chown(outside / "secret", os.getuid(), os.getgid()),
        "age_outside": lambda: os.utime(outside / "secret", (1, 1)),
        "mark_outside": lambda: os.setxattr(outside / "secret", "user.mark", b"mine"),
        "list_outside": lambda: os.listdir(outside),
        "write_outside": lambda: (outside / "planted").write_bytes(b"x"),
        "truncate_outside": lambda: os.truncate(outside / "secret", 0),
        "read_passwd": lambda: Path("/etc/passwd").read_bytes(),
        "read_parents_environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
        "climb_out": lambda: (target / ".." / outside.name / "secret").read_bytes(),
        "link_out": lambda: (target / "link").symlink_to(outside / "secret"),
        "hard_link_out": lambda: os.link(source / "given", target / "hard"),
        "make_fifo": lambda: os.mkfifo(target / "fifo"),
        "import_later": lambda: __import__("wave"),
    }


def _fork() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _raw(number: int, *arguments: int | ctypes.Array[ctypes.c_char]) -> int:
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def _burn() -> None:
    while True:
        pass


DEADLY: dict[str, Callable[[Path], object]] = {
    "memory": lambda target: bytearray(1 << 30),
    "huge_file": lambda target: (target / "huge").write_bytes(bytes(2 << 20)),
    "many_files": lambda target: [(target / str(number)).open("wb") for number in range(64)],
    "processor": lambda target: _burn(),
    "abort": lambda target: os.abort(),
}

if __name__ == "__main__":
    main(sys.argv[1:])

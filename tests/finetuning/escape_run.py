"""What a training process that its data has taken over might try, from inside its walls, amid others' things.

`python -m tests.finetuning.escape_run STORE JOB OTHER BASE [--free]`: raises the real walls around the real request of
JOB, tries everything, prints what each attempt met. Invariant: without walls (`--free`) every attempt succeeds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.trainer import walled_run
from serve.trainer.progress import Control, Progress, Stopped, TrainingRun
from serve.trainer.wire import RunRequest

NEEDED = {"thread", "read_base", "read_inputs", "write_run", "make_folder", "rename_in_run", "import_late"}


def attempts(store: Path, job: Path, other: Path, base: Path) -> dict[str, Callable[[], object]]:
    """Return every attempt by name; those in `NEEDED` are what training lives by."""
    run = job / "run-1"
    parent = os.getppid()
    return {
        "thread": lambda: threading.Thread(target=int).start(),
        "read_base": lambda: (base / "config.json").read_bytes(),
        "read_inputs": lambda: (job / "inputs" / "train.jsonl").read_bytes(),
        "write_run": lambda: (run / "made").write_bytes(b"x"),
        "make_folder": lambda: (run / "folder").mkdir(),
        "rename_in_run": lambda: (run / "made").rename(run / "folder" / "moved"),
        "import_late": lambda: __import__("wave"),
        "read_others_data": lambda: (other / "inputs" / "train.jsonl").read_bytes(),
        "list_others_job": lambda: os.listdir(other),
        "list_jobs": lambda: os.listdir(other.parent),
        "write_others_run": lambda: (other / "run-1" / "planted").write_bytes(b"x"),
        "read_data_file": lambda: (store / "training" / "files" / "file-1").read_bytes(),
        "read_jobs_database": lambda: (store / "training.sqlite").read_bytes(),
        "write_jobs_database": lambda: (store / "training.sqlite").open("ab").close(),
        "plant_export": lambda: (job / "exports" / "planted").mkdir(parents=True),
        "change_inputs": lambda: (job / "inputs" / "train.jsonl").write_bytes(b"x"),
        "change_base": lambda: (base / "config.json").write_bytes(b"{}"),
        "open_base_to_all": lambda: (base / "config.json").chmod(0o666),
        "plant_object": lambda: (store / "objects" / "planted").mkdir(parents=True),
        "read_passwd": lambda: Path("/etc/passwd").read_bytes(),
        "read_workers_environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "read_workers_memory": lambda: Path(f"/proc/{parent}/maps").read_bytes(),
        "write_tmp": lambda: Path("/dev/shm/chorale-escape").write_bytes(b"x"),
        "tcp": lambda: socket.socket(socket.AF_INET).close(),
        "tcp6": lambda: socket.socket(socket.AF_INET6).close(),
        "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
        "unix": lambda: socket.socket(socket.AF_UNIX).close(),
        "socket_pair": lambda: socket.socketpair()[0].close(),
        "exec": lambda: subprocess.run(["/bin/true"], check=True),
        "shell": lambda: subprocess.run(["/bin/sh", "-c", "true"], check=True),
        "fork": _fork,
        "signal_worker": lambda: os.kill(parent, 0),
        "signal_group": lambda: os.kill(0, signal.SIGCONT),
        "renice_worker": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
        "link_out": lambda: (run / "link").symlink_to("/etc/passwd"),
        "hard_link_out": lambda: os.link(job / "inputs" / "train.jsonl", run / "hard"),
        "fifo": lambda: os.mkfifo(run / "fifo"),
        "climb": lambda: (run / ".." / ".." / other.name / "inputs" / "train.jsonl").read_bytes(),
        "rename_own_run": lambda: run.rename(job / "run-2"),
    }


def main(arguments: list[str]) -> None:
    """Try everything, inside or outside of the walls."""
    store, job, other, base = (Path(argument) for argument in arguments[:4])
    found: dict[str, str] = {}

    def try_all(run: TrainingRun, control: Control) -> Iterator[Progress]:
        for name, attempt in attempts(store, job, other, base).items():
            try:
                attempt()
                found[name] = "succeeded"
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                found[name] = type(error).__name__
        yield Stopped(0, "cancel")

    request = RunRequest(
        base=str(base),
        inputs=str(job / "inputs"),
        folder=str(job / "run-1"),
        spec={"family": "lora"},
        device="cpu",
        num_threads=1,
        max_memory_bytes=16 << 30,
        device_memory_bytes=None,
        max_seconds=60,
        code_version="",
        parent="",
    )
    if len(arguments) > 4:
        for _ in try_all(request.run(), walled_run._Commands(0)):
            pass
    else:
        vars(walled_run)["run"] = try_all
        walled_run.train_inside(request, 0, os.open(os.devnull, os.O_WRONLY))
    print(json.dumps(found))


def _fork() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])

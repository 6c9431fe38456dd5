"""Processes that publish into a shared journal until they are killed; `test_journal` judges what they leave.

One warm process forks a worker per line of stdin (journal's store, log, name), since an import takes longer than a
life of theirs.
"""

import os
import signal
import sys
from pathlib import Path

from tests.store.registry_cases import new, open_alone, set_alias


def work(store: Path, log: int, name: str) -> None:
    """Publish, alias, delete and fold for ever; each is logged when it was acknowledged."""
    registry = open_alone(store)
    os.write(log, b"open\n")
    while True:
        for letter in "abc":
            os.write(log, f"ack {name} {registry.publish(new(name, letter)).version}\n".encode())
        set_alias(registry, name, "prod", registry.versions(name)[-1].version)
        registry.fold(retired_since=0)


def main() -> None:
    """Fork one child per line of stdin and print its process id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        store, log_path, name = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            work(Path(store), os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), name)
        print(pid, flush=True)


if __name__ == "__main__":
    main()

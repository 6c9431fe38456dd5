"""kill -9 at random points of uploads, replacements and deletions, then reopen and judge.

200 kills of a sound store: nothing torn, nothing acknowledged lost, no orphan. The same campaign against each planted
bug must convict it; otherwise its silence about the sound store would mean nothing.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live_server import REPO_ROOT
from tests.store.checker import Expected, Versions, judge
from tests.store.crash_worker import HELD, STORES, open_variant

NUM_KILLS = 200
# a planted bug must be convicted within this many kills
MAX_KILLS = 150
# log lines to wait for: opening, then two per change
MAX_LINES = 8
# about as long as one change takes
MAX_DELAY_S = 0.006
# only a hang takes so long
HANG_S = 120.0


@dataclass(frozen=True)
class Moment:
    """When to kill: so long after the worker's log has so many lines (0: it may still be opening the store)."""

    num_lines: int
    delay_s: float


class Zygote:
    """A warm process that forks workers on demand."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.crash_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPO_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )

    def start(self, root: Path, log: Path, seed: int, variant: str, names: list[str]) -> int:
        """Start a worker on `names` and return its process id."""
        assert self._process.stdin is not None and self._process.stdout is not None
        log.touch()
        self._process.stdin.write(f"{root}\t{log}\t{seed}\t{variant}\t{','.join(names)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the zygote; its workers are all dead by then."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(HANG_S)


def kill_at(moment: Moment, pids: list[int], log: Path) -> list[str]:
    """Kill all workers at the moment that the log of the first one says, or in its planted window if that comes first.

    Returns when they are gone, with what is wrong: a worker works until it is killed, so one that ended before failed.
    """
    deadline = time.monotonic() + HANG_S
    while not _has_come(moment, log.read_text()) and _is_alive(pids[0]):
        assert time.monotonic() < deadline, "the worker hangs"
        time.sleep(0.0003)
    time.sleep(moment.delay_s)
    ended = [f"worker {number} ended by itself" for number, pid in enumerate(pids) if not _kill(pid)]
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a killed worker is still there"
        time.sleep(0.0003)
    return ended


def _has_come(moment: Moment, log: str) -> bool:
    return log.count("\n") >= moment.num_lines or log.endswith(f"{HELD}\n")


def _kill(pid: int) -> bool:
    """Return whether there was a process to kill."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """Return a running zygote."""
    started = Zygote()
    yield started
    started.close()


def what_the_clients_know(known: Versions, logs: list[Path]) -> Expected:
    """Follow the workers' logs, each about names of its own, from what was known before them."""
    expected = Expected({name: dict(versions) for name, versions in known.items()})
    for line in "".join(log.read_text() for log in logs).splitlines():
        match line.split():
            case ["try", change, name]:
                expected.try_to(change, name)
            case ["ack", "put", name, version, digest]:
                expected.acknowledge_put(name, int(version), digest)
            case ["ack", "del", name]:
                expected.acknowledge_delete(name)
            case _:
                assert line in ("open", HELD), f"a torn line: {line!r}"
    return expected


@dataclass(frozen=True)
class Outcome:
    """What a campaign did and found."""

    num_kills: int
    num_acks: int
    num_unanswered: int
    violations: list[str]


def campaign(zygote: Zygote, folder: Path, variant: str, max_kills: int, num_workers: int = 1) -> Outcome:
    """Kill workers on one store until something is wrong with it, or `max_kills` times; each has names of its own."""
    choose = random.Random(20260921)
    root, known = folder / "store", Versions()
    names = [[f"{worker}.{letter}" for letter in "abc"] for worker in range(num_workers)]
    num_acks = num_unanswered = number = 0
    violations: list[str] = []
    while number < max_kills and not violations:
        logs = [folder / f"log{number}.{worker}" for worker in range(num_workers)]
        pids = [
            zygote.start(root, log, 1000 * (number * num_workers + worker), variant, names[worker])
            for worker, log in enumerate(logs)
        ]
        moment = Moment(choose.randrange(MAX_LINES), choose.uniform(0, MAX_DELAY_S))
        ended = kill_at(moment, pids, logs[0])
        expected = what_the_clients_know(known, logs)
        num_acks += sum(log.read_text().count("ack ") for log in logs)
        num_unanswered += len(expected.unanswered)
        verdict = judge(root, expected, [name for own in names for name in own], open_variant(variant))
        violations = [f"kill {number}: {line}" for line in ended + verdict.violations]
        known = verdict.found
        number += 1
    return Outcome(number, num_acks, num_unanswered, violations)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where there is one: SIGKILL keeps the page cache, so a disk would only cost time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


def test_200_kills_tear_lose_and_orphan_nothing(zygote: Zygote, folder: Path) -> None:
    outcome = campaign(zygote, folder, "sound", NUM_KILLS)
    print(outcome)
    assert outcome.violations == []
    assert outcome.num_kills == NUM_KILLS
    # otherwise the kills met nothing worth tearing
    assert outcome.num_acks > NUM_KILLS // 2 and outcome.num_unanswered > NUM_KILLS // 4


def test_kills_of_three_processes_on_one_store_tear_lose_and_orphan_nothing(zygote: Zygote, folder: Path) -> None:
    outcome = campaign(zygote, folder, "sound", NUM_KILLS // 5, num_workers=3)
    print(outcome)
    assert outcome.violations == []
    assert outcome.num_acks > NUM_KILLS // 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_5000_kills_tear_lose_and_orphan_nothing(zygote: Zygote, folder: Path) -> None:
    outcome = campaign(zygote, folder, "sound", 5000)
    print(outcome)
    assert outcome.violations == []


@pytest.mark.parametrize("bug", [name for name in STORES if name != "sound"])
def test_the_campaign_convicts_a_planted_bug(bug: str, zygote: Zygote, folder: Path) -> None:
    outcome = campaign(zygote, folder, bug, MAX_KILLS, num_workers=3 if "processes" in bug else 1)
    print(outcome)
    assert outcome.violations, f"{MAX_KILLS} kills did not show that {bug}"

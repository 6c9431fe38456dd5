"""Workers that are killed at random moments, until every job is done; told as JSON.

`python -m tests.finetuning.kill_trials FOLDER NUM_KILLS SEED`: imports torch once and forks each worker, which forks
its training process, walls and all. Invariants that are counted: every job ends with one result, whose bytes and whose
checkpoints' are those of an uninterrupted run; each step was told once; no training process outlives its worker.
"""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from adapters_store.jobs.database import TrainingDatabase
from adapters_store.jobs.folders import TrainingFolders
from adapters_store.jobs.job import JobState
from adapters_store.jobs.jobs_sqlite import SqliteJobs
from adapters_store.jobs.outbox_sqlite import SqliteOutbox
from adapters_store.jobs.queue_sqlite import MAX_LOST, SqliteJobQueue
from adapters_store.jobs.spec import TrainSpec
from adapters_store.strict_json import Json
from serve.trainer.attempt import WorkerConfig
from serve.trainer.child import Child
from serve.trainer.walled_run import die_with, train_inside
from serve.trainer.wire import RunRequest
from serve.trainer.worker import Worker
from tests.finetuning.training_store import BASE, new_job
from tests.tiny_model import write_tiny_model

LEASE_S = 600.0
DATA_ID = "file-data"
SPEC: dict[str, Json] = {
    "family": "lora",
    "rank": 2,
    "max_steps": 6,
    "batch_size": 2,
    "checkpoint_every": 2,
    "max_length": 32,
    "seed": 3,
}
# far below what gives a job up
MAX_KILLS_OF_ONE = MAX_LOST - 1


class JumpingClock:
    """The time of all processes, which the test moves so that a dead worker's lease runs out."""

    def __init__(self) -> None:
        self._ahead = mmap.mmap(-1, 8)
        self._ahead[:] = struct.pack("d", 0.0)

    def __call__(self) -> float:
        """Return the time."""
        return time.time() + float(struct.unpack("d", self._ahead[:])[0])

    def jump(self, seconds: float) -> None:
        """Move it for everybody."""
        self._ahead[:] = struct.pack("d", struct.unpack("d", self._ahead[:])[0] + seconds)


def fork_child(request: RunRequest) -> Child:
    """Start the training process as a fork of this one: all it imports is there."""
    commands_read, commands = os.pipe()
    messages, messages_write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_with(parent)
            os.close(commands)
            os.close(messages)
            train_inside(request, commands_read, messages_write)
            status = 0
        finally:
            os._exit(status)
    os.close(commands_read)
    os.close(messages_write)
    return Child(pid, commands, messages)


@dataclass
class Trials:
    """One store, in which jobs are trained and killed."""

    root: Path

    def __post_init__(self) -> None:
        """Open the store."""
        self.base = write_tiny_model(self.root / "model")
        self.store = self.root / "store"
        self.clock = JumpingClock()
        self.folders = TrainingFolders(self.store)
        database = TrainingDatabase(self.store, self.clock)
        self.jobs, self.outbox = SqliteJobs(database), SqliteOutbox(database)
        pairs = [{"prompt": f"q{number}", "completion": f" answer {number}"} for number in range(12)]
        (self.folders.data_files / DATA_ID).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def new(self) -> str:
        """Queue a job and return its id."""
        spec = TrainSpec.parse({**SPEC})
        facts = new_job(base=BASE, spec=dict(SPEC), seed=spec.seed)
        job_id = f"ftjob-{self.jobs.counts()[JobState.PUBLISHING] + sum(self.jobs.counts().values()):024d}"
        self.folders.make_job(job_id, {"train.jsonl": DATA_ID}, {})
        return self.jobs.create(facts, job_id=job_id).id

    def work(self, kill_after_s: float | None) -> bool:
        """Let a new worker take the next job; return whether it was killed before it was through."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setpgid(0, 0)
                database = TrainingDatabase(self.store, self.clock)
                config = WorkerConfig("w", self.base, BASE, lease_s=LEASE_S)
                Worker(config, SqliteJobQueue(database), TrainingFolders(self.store), fork_child).run_one()
                status = 0
            finally:
                os._exit(status)
        deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0, f"the worker ended with status {status}"
                return False
            if deadline is not None and time.monotonic() >= deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True
            time.sleep(0.001)

    def exports(self, job_id: str) -> dict[str, dict[str, bytes]]:
        """Return the files of what the job has handed over: its checkpoints by step, and its result."""
        found = {}
        for parcel in self.outbox.parcels(BASE):
            if parcel.job.id == job_id:
                folder = self.folders.job(job_id) / parcel.export
                found[str(parcel.step)] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return found


def survivors(session: int) -> list[int]:
    """Return the processes of our session that are neither this one nor gone; they get time to die."""
    deadline = time.monotonic() + 120
    while True:
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    text = Path(f"/proc/{name}/stat").read_text()
                except OSError:
                    continue
                state, _, _, its_session = text.rpartition(")")[2].split()[:4]
                if int(its_session) == session and state not in "ZX":
                    found.append(int(name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.005)


def main(arguments: list[str]) -> None:
    """Run the trials and print what was counted."""
    root, num_wanted, numbers = Path(arguments[0]), int(arguments[1]), random.Random(int(arguments[2]))
    os.setsid()
    trials = Trials(root)
    first = trials.new()
    start_s = time.monotonic()
    assert not trials.work(None)
    whole_s = time.monotonic() - start_s
    wanted = trials.exports(first)
    num_kills, num_jobs, wrong = 0, 0, list[str]()
    while num_kills < num_wanted:
        job_id, num_jobs, num_lost = trials.new(), num_jobs + 1, 0
        while trials.jobs.get(job_id, None).state in (JobState.QUEUED, JobState.RUNNING):
            may_kill = num_lost < MAX_KILLS_OF_ONE and num_kills < num_wanted
            if trials.work(numbers.uniform(0.0, 1.1 * whole_s) if may_kill else None):
                num_kills, num_lost = num_kills + 1, num_lost + 1
                wrong += [f"{job_id}: outlived its worker" for _ in survivors(os.getpid())]
            found = trials.exports(job_id)
            wrong += [f"{job_id}: export {name} differs" for name in found if found[name] != wanted[name]]
            trials.clock.jump(LEASE_S + 1)
        job = trials.jobs.get(job_id, None)
        if job.state is not JobState.PUBLISHING or trials.exports(job_id).keys() != wanted.keys():
            wrong.append(f"{job_id}: {job.state}, {sorted(trials.exports(job_id))}, {job.error}")
        steps = [
            event.data["step"]
            for event in trials.jobs.events(job_id, None, limit=1000).items
            if event.type == "metrics" and event.data is not None
        ]
        if steps != [6, 5, 4, 3, 2, 1]:
            wrong.append(f"{job_id}: told steps {steps}")
        # done by hand what the publisher does, so that the outbox stays short
        for parcel in trials.outbox.parcels(BASE):
            if parcel.job.id == job_id:
                trials.outbox.published(parcel)
    print(json.dumps({"kills": num_kills, "jobs": num_jobs, "wrong": wrong, "names": sorted(wanted)}))


if __name__ == "__main__":
    main(sys.argv[1:])

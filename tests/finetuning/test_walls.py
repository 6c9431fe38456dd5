"""The training process's walls, attacked from inside; every attempt is first shown to succeed without them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_store.jobs.database import TrainingDatabase
from adapters_store.jobs.folders import TrainingFolders
from tests.finetuning.escape_run import NEEDED
from tests.live_server import REPO_ROOT, server_environment
from tests.store.test_sandbox import BY_LANDLOCK, HARMLESS, Cell, cell, met

__all__ = ["cell"]


def lay_out(root: Path) -> list[str]:
    """Make a store with two tenants' jobs and a base; return what `escape_run` is told."""
    store, base = root / "store", root / "base"
    TrainingDatabase(store, lambda: 0.0).close()
    folders = TrainingFolders(store)
    (folders.data_files / "file-1").write_text("secret")
    base.mkdir()
    (base / "config.json").write_text("{}")
    for job_id in ("ftjob-mine", "ftjob-other"):
        folders.make_job(job_id, {"train.jsonl": "file-1"}, {})
        folders.begin_run(job_id, 1)
    return [str(store), str(folders.job("ftjob-mine")), str(folders.job("ftjob-other")), str(base)]


def run(arguments: list[str]) -> dict[str, str]:
    """Try everything in a process of its own."""
    command = [sys.executable, "-m", "tests.finetuning.escape_run", *arguments]
    environment = {**server_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(600)
def test_inside_its_walls_no_attempt_of_a_training_process_succeeds(tmp_path: Path) -> None:
    free = run([*lay_out(tmp_path / "free"), "--free"])
    assert {name for name, outcome in free.items() if outcome != "succeeded"} == set()
    walled = run(lay_out(tmp_path / "walled"))
    assert walled.keys() == free.keys() and len(walled.keys() - NEEDED) >= 30
    assert {name for name in NEEDED if walled[name] != "succeeded"} == set()
    escaped = {name for name, outcome in walled.items() if outcome == "succeeded"} - NEEDED
    assert not escaped
    assert (tmp_path / "walled" / "base" / "config.json").read_text() == "{}"


def test_the_converters_attacks_fail_on_the_trainers_walls_too_but_threads(cell: Cell) -> None:
    missing, outcomes = met(cell.run("--train all"))
    for name, outcome in outcomes.items():
        is_held = not (name in BY_LANDLOCK and "landlock" in missing) and "seccomp" not in missing
        if name in HARMLESS | {"thread"}:
            assert outcome == "succeeded", name
        elif is_held:
            assert outcome in ("PermissionError", "RuntimeError", "ValueError"), f"{name}: {outcome}"

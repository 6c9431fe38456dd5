"""kill -9 of the worker at random moments: another one resumes, bit by bit, and nothing is done twice or by halves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live_server import REPO_ROOT, server_environment


def run_trials(folder: Path, num_kills: int, seed: int, *, timeout_s: float) -> dict[str, object]:
    """Run the trials in a process that may fork: it has no threads but its own."""
    command = [sys.executable, "-m", "tests.finetuning.kill_trials", str(folder), str(num_kills), str(seed)]
    environment = {**server_environment(), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return told


def check(told: dict[str, object], num_kills: int) -> None:
    """Fail unless all kills were survived."""
    assert told["wrong"] == []
    assert told["kills"] == num_kills
    assert told["names"] == ["2", "4", "None"]


@pytest.mark.timeout(900)
def test_thirty_killed_workers_leave_the_same_bytes(tmp_path: Path) -> None:
    check(run_trials(tmp_path, 30, seed=5, timeout_s=880), 30)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_killed_workers_leave_the_same_bytes(tmp_path: Path) -> None:
    check(run_trials(tmp_path, 1000, seed=6, timeout_s=7100), 1000)

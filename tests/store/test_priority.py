"""A helper in a session of its own steps back with its session; one in a session of others leaves that alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live_server import REPO_ROOT

_AUTOGROUP = Path("/proc/self/autogroup")
_PROGRAM = """
import os
from pathlib import Path
from adapters_store.priority import step_back
before = os.nice(0)
step_back(7)
group = Path("/proc/self/autogroup")
print(os.nice(0) - before, group.read_text().split()[-1] if group.exists() else "none")
"""


def run_in(*, own_session: bool) -> tuple[int, str]:
    """Return by how much the niceness rose, and the session's afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        cwd=REPO_ROOT,
        # away from the session of the tests, which stays as it is whatever the program does
        start_new_session=own_session,
        preexec_fn=None if own_session else _fork_into_session,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    rise, group = done.stdout.split()
    return int(rise), group


def _fork_into_session() -> None:
    """Become a member, not the leader, of a session that is not the tests' own."""
    os.setsid()
    if (child := os.fork()) > 0:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_session_of_its_own_steps_back_too() -> None:
    rise, group = run_in(own_session=True)
    assert rise == min(7, 19 - os.nice(0))
    if group == "none":
        pytest.skip("this kernel weighs no sessions")
    assert group == "7"


def test_a_session_of_others_is_left_alone() -> None:
    rise, group = run_in(own_session=False)
    assert rise == min(7, 19 - os.nice(0))
    assert group in ("none", "0")

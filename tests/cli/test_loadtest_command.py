"""`chorale loadtest`: hands everything over to the tester, or says which extra is missing."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from serve.cli import loadtest_command
from serve.cli.app import app
from tests.live_server import REPO_ROOT, server_environment


@pytest.mark.parametrize(("argument", "status", "shown"), [("--help", 0, "--verify"), ("nowhere", 2, "nowhere")])
def test_every_argument_reaches_the_tester(argument: str, status: int, shown: str) -> None:
    command = [sys.executable, "-m", "serve", "loadtest", argument]
    done = subprocess.run(command, cwd=REPO_ROOT, env=server_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == status
    assert shown in done.stdout + done.stderr


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadtest_command, "NEEDED", ("no_such_package",))
    result = CliRunner().invoke(app, ["loadtest", "--list"])
    assert result.exit_code == 2
    assert "no_such_package" in result.output and "chorale[loadtest]" in result.output

"""Nothing is compiled while serving: a kernel that only some steps launch would stop all of them for seconds."""

import subprocess
import sys

from tests.live_server import REPO_ROOT, server_environment


def test_the_start_has_compiled_whatever_serving_launches() -> None:
    environment = {name: value for name, value in server_environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.late_launches"]
    child = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    *late, summary = child.stdout.splitlines()
    assert late == [] and not summary.startswith("0 launches"), child.stdout

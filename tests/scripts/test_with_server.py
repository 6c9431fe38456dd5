"""A server that is started for one command: the command waits for its adapters, and nothing of it is left behind.

Owns a stand-in for make that, like make, starts the server as a child and does not pass SIGINT on.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.free_port import free_port
from tests.live_server import REPO_ROOT

_SERVER = """
import os, pathlib, signal
pathlib.Path("pid").write_text(str(os.getpid()))
pathlib.Path("published").write_text("all")
print("chorale train-worker ready x\\nchorale ready http://here", flush=True)
signal.pause()
"""
_MAKE = f"""#!{sys.executable}
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(subprocess.run([sys.executable, "-c", {{body!r}}], preexec_fn=restore, check=False).returncode)
"""


def _run(folder: Path, body: str, command: str) -> "subprocess.CompletedProcess[str]":
    make = folder / "make"
    make.write_text(_MAKE.format(body=body), encoding="utf-8")
    make.chmod(0o755)
    port = str(free_port())
    script = REPO_ROOT / "scripts" / "with_server.py"
    return subprocess.run(
        [sys.executable, str(script), "--port", port, "--", sys.executable, "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_command_finds_what_was_published_and_the_server_ends_with_it(tmp_path: Path) -> None:
    done = _run(tmp_path, _SERVER, "import pathlib, sys; sys.exit(pathlib.Path('published').read_text() != 'all')")
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_server_that_dies_is_one_clear_line(tmp_path: Path) -> None:
    done = _run(tmp_path, "raise SystemExit(3)", "raise SystemExit(0)")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "ended" in done.stderr

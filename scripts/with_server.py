"""Run a command against the server on a port, starting one for its duration if none answers there.

Owns the life of the server it started, and of no other: one that already runs is used and left alone.
Invariant: whatever ends the command (also Ctrl-C), a server started here is stopped by its own process id.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


def answers(url: str) -> bool:
    """Say whether a server at `url` is ready."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def wait_until_ready(url: str, server: "subprocess.Popen[str]") -> None:
    """Return once server and adapters are ready, by its own word; exit with one line when it died or took too long."""
    assert server.stdout is not None, "it was started with a pipe"
    watch = threading.Timer(START_TIMEOUT_S, stop, [server])
    watch.start()
    try:
        # answering is not enough: the demo's adapters are published after the engine is up
        if not any(line.startswith("chorale ready ") for line in server.stdout):
            sys.exit(f"the server on {url} ended, or was not ready within {START_TIMEOUT_S:.0f} s; see its lines above")
    finally:
        watch.cancel()


def stop(server: "subprocess.Popen[str]") -> None:
    """End make and what it started, gently first; no load balancer stands before it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def main() -> int:
    """Parse the command line, run the command, return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("command", nargs="+", help="after `--`: the command to run")
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{arguments.port}"
    if answers(url):
        return subprocess.call(arguments.command)
    print(f"no server answers on {url}: starting one for this command (make serve PORT={arguments.port})", flush=True)
    # quiet, so that the command's own last line stays the last one
    quiet = ["--no-print-directory", "ARGS=--log-level warning"]
    # a group of its own: make does not pass Ctrl-C's signal on
    command = ["make", *quiet, "serve", f"PORT={arguments.port}"]
    server = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        wait_until_ready(url, server)
        return subprocess.call(arguments.command)
    finally:
        stop(server)


if __name__ == "__main__":
    sys.exit(main())

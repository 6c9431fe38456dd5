"""Run a command against the server on a port, starting one for its duration if none answers there.

Owns the life of the server it started, and of no other: one that already runs is used and left alone.
Invariant: whatever ends the command (also Ctrl-C), a server started here is stopped by its own process id.
"""

import argparse
import signal
import subprocess
import sys
import time
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


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return once the server answers; exit with one line when it died or took too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(url):
        if server.poll() is not None:
            sys.exit(
                f"the server on {url} ended with status {server.returncode} before it was ready; see its lines above"
            )
        if time.monotonic() > deadline:
            sys.exit(f"the server on {url} was not ready after {START_TIMEOUT_S:.0f} s")
        time.sleep(0.2)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, gently first; no load balancer stands before it."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
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
    server = subprocess.Popen(["make", *quiet, "serve", f"PORT={arguments.port}"])
    try:
        wait_until_ready(url, server)
        return subprocess.call(arguments.command)
    finally:
        stop(server)


if __name__ == "__main__":
    sys.exit(main())

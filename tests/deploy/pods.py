"""A pod's server container as a process on this machine: its environment, its mounts and its arguments, as rendered.

Owns the mapping. Invariant: nothing of the environment comes from whoever runs the tests but PATH and PYTHONPATH.
"""

import os
import re
import subprocess
import time
from pathlib import Path

import httpx

from tests.deploy.chart import Json, objects, of_kind
from tests.deploy.policies import Item
from tests.deploy.proxies import Address
from tests.live_server import SERVER_PYTHON, server_environment

TIMEOUT_S = 600.0
# a connection that was idle may be closed by the server just when it is used again
FRESH = httpx.Limits(max_keepalive_connections=0)


class ServerPod:
    """The first container of the server's Deployment."""

    def __init__(self, values: Json, folder: Path, secrets: dict[tuple[str, str], str], files: dict[str, Path]) -> None:
        """Render and map.

        Args:
            secrets: (name, key) -> value of each Secret that the environment reads.
            files: mount path -> folder that is there already; other writable mounts become empty folders.
        """
        found: list[Item] = objects(values)
        deployment: Item = of_kind(found, "Deployment")[0]
        self._folder = folder
        self._container: Item = deployment["spec"]["template"]["spec"]["containers"][0]
        paths = [mount["mountPath"] for mount in self._container["volumeMounts"]]
        self._mounts = {path: files.get(path, folder / path.strip("/")) for path in paths}
        for path in self._mounts.values():
            if not path.is_dir():
                path.mkdir(parents=True)
                # as a volume with an fsGroup is
                path.chmod(0o2775)
        (config,) = (item["data"] for item in found if item["kind"] == "ConfigMap" and "CHORALE_MODEL" in item["data"])
        given = {**config, **{entry["name"]: _value(entry, secrets) for entry in self._container["env"]}}
        self.environment = {name: self._mapped(value) for name, value in given.items()}

    def start(self, address: Address) -> None:
        """Start the server at an address instead of its own, and wait until its probes succeed."""
        place = {"CHORALE_HOST": address.host, "CHORALE_PORT": str(address.port), "PATH": os.environ["PATH"]}
        environment = {**self.environment, **place, "PYTHONPATH": server_environment()["PYTHONPATH"]}
        self._url = f"http://{address}"
        self.log = self._folder / "server.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [SERVER_PYTHON, "-m", "serve", *self._container["args"]],
                env=environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            self._wait_for(self._container[kind]["httpGet"]["path"])

    def client(self, key: str) -> httpx.Client:
        """Return a client with a key; the caller closes it."""
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self._url, timeout=TIMEOUT_S, trust_env=False, headers=headers, limits=FRESH)

    def stop(self) -> int:
        """End it as the kubelet does and return its status."""
        self._process.terminate()
        try:
            return self._process.wait(TIMEOUT_S)
        finally:
            self._process.kill()

    def _wait_for(self, path: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self._answers(path):
            is_alive = self._process.poll() is None and time.monotonic() < deadline
            assert is_alive, f"{path} does not succeed:\n{self.log.read_text(encoding='utf-8')[-3000:]}"
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        try:
            return httpx.get(f"{self._url}{path}", timeout=60.0, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _mapped(self, text: str) -> str:
        mounts = "|".join(re.escape(path) for path in sorted(self._mounts, key=len, reverse=True))
        return re.sub(rf"(?<![\w./-])({mounts})(?![\w-])", lambda match: str(self._mounts[match[1]]), text)


def _value(entry: Item, secrets: dict[tuple[str, str], str]) -> str:
    if "value" in entry:
        return str(entry["value"])
    reference = entry["valueFrom"]["secretKeyRef"]
    return secrets[reference["name"], reference["key"]]

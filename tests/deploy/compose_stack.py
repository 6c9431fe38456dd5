"""The services of deploy/compose.yaml as ordinary processes on loopback: commands, environments, health checks.

Owns the processes and the folders that stand for volumes. What a container does is done by mapping, and nothing else is
changed: paths of volumes to folders, names of services to addresses, the image's entry point to this checkout.
Invariant: what was started is stopped, in the opposite order.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from scripts import debian_tools
from tests.deploy.chart import Json, read
from tests.deploy.proxies import own_address, program
from tests.deploy.redis_beside import redis_program
from tests.live_server import REPO_ROOT, SERVER_PYTHON, server_environment

DEPLOY = REPO_ROOT / "deploy"
TIMEOUT_S = 600.0
# of those that run here: the port that each listens on in its container
PORTS = {"server": "8000", "redis": "6379", "prometheus": "9090"}


def image_environment() -> dict[str, str]:
    """Return what the Dockerfile's last ENV sets."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


def image_command() -> list[str]:
    """Return the Dockerfile's entry point."""
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    found = json.loads(entry)
    assert isinstance(found, list)
    return found


class Stack:
    """Services by name, each started after those that it depends on are healthy."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        """Map nothing yet but the names of services.

        Args:
            variables: what the caller of `docker compose` has in the environment.
        """
        self._folder = folder
        self._variables = variables
        self._services: dict[str, Json] = read(DEPLOY / "compose.yaml")["services"]  # type: ignore[assignment]
        self.addresses = {name: own_address(number) for number, name in enumerate(PORTS)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start a service and what it depends on, and wait for its health check."""
        service = self._services[name]
        for other in _keys(service.get("depends_on")):
            if other not in self.processes:
                self.start(other)
        paths = self._paths(name)
        command, environment = self._command(name, paths), self._environment(name, paths)
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_until_healthy(name, environment)

    def stop(self) -> dict[str, int]:
        """Send SIGTERM to each service, the last one first, and return how each ended."""
        statuses = {}
        while self.processes:
            name, process = self.processes.popitem()
            process.terminate()
            try:
                statuses[name] = process.wait(TIMEOUT_S)
            finally:
                process.kill()
        return statuses

    def url(self, name: str) -> str:
        """Return where a service answers."""
        return f"http://{self.addresses[name]}"

    def log(self, name: str) -> Path:
        """Return where a service's output lies."""
        return self._folder / f"{name}.log"

    def _paths(self, name: str) -> dict[str, Path]:
        """Return the folder for each path that the service mounts."""
        service = self._services[name]
        found = {}
        for entry in _strings(service.get("volumes")):
            source, target = self._filled(entry).removesuffix(":ro").rsplit(":", 1)
            if source.startswith("./"):
                found[target] = self._copied(DEPLOY / source, name)
            elif source.startswith("/"):
                # a copy under the name that it is mounted at: the base is called after it
                found[target] = self._folder / "mounts" / target.strip("/")
                shutil.copytree(source, found[target], dirs_exist_ok=True)
            else:
                found[target] = self._folder / "volumes" / source
        for entry in _strings(service.get("tmpfs")):
            target = entry.split(":")[0]
            found[target] = self._folder / "tmpfs" / name / target.strip("/")
        for path in found.values():
            path.mkdir(parents=True, exist_ok=True)
        return found

    def _copied(self, source: Path, name: str) -> Path:
        """Return a copy of configuration in which services are addresses, and 15 seconds are one."""
        target = self._folder / "configuration" / name / source.name
        shutil.copytree(source, target, dirs_exist_ok=True)
        for path in target.glob("*.yaml"):
            text = self._addressed(path.read_text(encoding="utf-8"))
            path.write_text(re.sub(r"^(  \w+_interval: )15s$", r"\g<1>1s", text, flags=re.MULTILINE), encoding="utf-8")
        return target

    def _command(self, name: str, paths: dict[str, Path]) -> list[str]:
        given = [self._mapped(word, paths) for word in _strings(self._services[name]["command"])]
        address = self.addresses.get(name)
        if name == "redis":
            place = ["--bind", address.host, "--port", str(address.port)] if address else []
            return [redis_program(given[0]), *given[1:], *place, "--dir", str(paths["/data"])]
        if name == "prometheus":
            return [program("prometheus"), *given, f"--web.listen-address={address}"]
        (entry,) = image_command()
        assert entry == "chorale", f"the image starts {entry}"
        return [SERVER_PYTHON, "-m", "serve", *given]

    def _environment(self, name: str, paths: dict[str, Path]) -> dict[str, str]:
        """Return the image's and the service's own variables alone: nothing comes from whoever runs the tests."""
        given = self._services[name].get("environment", {})
        assert isinstance(given, dict)
        own = image_environment() if "chorale" in str(self._services[name]["image"]) else {}
        environment = own | {str(key): self._filled(str(value)) for key, value in given.items()}
        environment = {key: self._mapped(value, paths) for key, value in environment.items()}
        if name == "server":
            environment["CHORALE_HOST"] = self.addresses[name].host
            environment["CHORALE_PORT"] = str(self.addresses[name].port)
        environment["PATH"] = os.environ["PATH"]
        if own:
            environment["PYTHONPATH"] = server_environment()["PYTHONPATH"]
            return environment
        return {"LD_LIBRARY_PATH": debian_tools.environment()["LD_LIBRARY_PATH"], **environment}

    def _wait_until_healthy(self, name: str, environment: dict[str, str]) -> None:
        check = self._services[name].get("healthcheck", {})
        words = _strings(check.get("test")) if isinstance(check, dict) else []
        if not words:
            return
        assert words[0] == "CMD", words
        address = self.addresses[name]
        command = [word.replace(f"127.0.0.1:{PORTS[name]}", str(address)) for word in words[1:]]
        if command[0] == "redis-cli":
            command = [redis_program("redis-cli"), "-h", address.host, "-p", str(address.port), *command[1:]]
        elif command[0] == "python":
            command[0] = SERVER_PYTHON
        deadline = time.monotonic() + TIMEOUT_S
        while subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0:
            is_alive = self.processes[name].poll() is None and time.monotonic() < deadline
            assert is_alive, f"{name} is not healthy:\n{self.log(name).read_text(encoding='utf-8')[-3000:]}"
            time.sleep(0.1)

    def _mapped(self, text: str, paths: dict[str, Path]) -> str:
        # in one pass, the longest first: what a path is mapped to is no path of the container
        found = "|".join(re.escape(path) for path in sorted(paths, key=len, reverse=True))
        if found:
            text = re.sub(rf"(?<![\w./-])({found})(?![\w-])", lambda match: str(paths[match[1]]), text)
        return self._addressed(text)

    def _addressed(self, text: str) -> str:
        for name, port in PORTS.items():
            text = re.sub(rf"(?<![\w.]){name}:{port}\b", str(self.addresses[name]), text)
        return text

    def _filled(self, text: str) -> str:
        """Return a text with its variables filled in, as compose does."""

        def value(match: "re.Match[str]") -> str:
            name, kind, rest = match.groups()
            found = self._variables.get(name) or (rest if kind == ":-" else None)
            assert found is not None, f"compose.yaml asks for {name}: {rest}"
            return found

        return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []

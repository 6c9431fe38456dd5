"""A real haproxy and a real nginx, with the configurations that deploy/proxy ships, before servers on loopback.

Owns the processes and the addresses. Each test process has loopback addresses of its own (127.x.y.z, from its process
id), so a port that a restarting server gives up for a moment can be taken by nobody else. Invariant: what was started
is stopped.
"""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts import debian_tools
from tests.live_server import REPO_ROOT

CONFIGS = REPO_ROOT / "deploy" / "proxy"
START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where something listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def own_address(number: int) -> Address:
    """Return a free port of a loopback address that no other process uses: `number` tells a process's own apart."""
    pid = os.getpid()
    host = f"127.{1 + (pid >> 14) % 254}.{(pid >> 6) % 256}.{1 + (pid % 64) * 3 + number % 3}"
    with socket.create_server((host, 0)) as probe:
        return Address(host, probe.getsockname()[1])


def program(name: str) -> str:
    """Return a program's path; skips where it is missing and could not be fetched."""
    path = debian_tools.find(name)
    if path is None:
        pytest.skip(f"{name} is missing, and `make debian-tools` could not fetch it: install the package")
    return str(path)


@contextlib.contextmanager
def haproxy(servers: tuple[Address, Address], listen: Address, folder: Path) -> Iterator["Haproxy"]:
    """Run haproxy before two servers."""
    # a socket's path has at most 108 bytes
    with tempfile.TemporaryDirectory(prefix="hap") as short:
        stats = Path(short) / "s"
        variables = {"CHORALE_LISTEN": listen, "CHORALE_ONE": servers[0], "CHORALE_TWO": servers[1]}
        environment = debian_tools.environment() | {name: str(value) for name, value in variables.items()}
        environment["CHORALE_STATS"] = str(stats)
        command = [program("haproxy"), "-db", "-f", str(CONFIGS / "haproxy.cfg")]
        with _running(command, environment, folder / "haproxy.log", listen):
            yield Haproxy(stats)


class Haproxy:
    """What a running haproxy says about itself."""

    def __init__(self, stats: Path) -> None:
        self._stats = stats

    def rows(self) -> dict[str, dict[str, str]]:
        """Return its table of statistics by server name."""
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(START_TIMEOUT_S)
            door.connect(str(self._stats))
            door.sendall(b"show stat\n")
            text = b"".join(iter(lambda: door.recv(1 << 16), b"")).decode()
        names, *lines = text.removeprefix("# ").splitlines()
        rows = [dict(zip(names.split(","), line.split(","), strict=False)) for line in lines if line]
        return {row["svname"]: row for row in rows if row["pxname"] == "chorale"}

    def wait_until(self, server: str, status: str) -> None:
        """Return once it holds a server for UP or DOWN."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (seen := self.rows()[server]["status"]).startswith(status):
            assert time.monotonic() < deadline, f"haproxy holds {server} for {seen}, not {status}"
            time.sleep(0.02)


@contextlib.contextmanager
def nginx(servers: tuple[Address, Address], listen: Address, folder: Path) -> Iterator[None]:
    """Run nginx before two servers."""
    text = (CONFIGS / "nginx.conf").read_text(encoding="utf-8")
    for shipped, ours in (("127.0.0.1:8001", servers[0]), ("127.0.0.1:8002", servers[1]), ("127.0.0.1:8080", listen)):
        assert text.count(shipped) == 1, f"nginx.conf names {shipped} {text.count(shipped)} times"
        text = text.replace(shipped, str(ours))
    paths = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy"))
    paths += "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in ("fastcgi", "uwsgi", "scgi"))
    text = re.sub(r"^http \{\n", f"http {{\n{paths}", text, flags=re.MULTILINE)
    config = folder / "nginx.conf"
    # one process in the foreground, that may be started by root and by others
    config.write_text(f"daemon off; master_process off; pid {folder}/nginx.pid;\n{text}", encoding="utf-8")
    command = [program("nginx"), "-e", str(folder / "nginx.log"), "-p", str(folder), "-c", str(config)]
    with _running(command, debian_tools.environment(), folder / "nginx.out", listen):
        yield


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path, listen: Address) -> Iterator[None]:
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(listen):
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, f"{command[0]} does not listen on {listen}:\n{log.read_text(encoding='utf-8')[-2000:]}"
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(60.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: Address) -> bool:
    try:
        socket.create_connection((address.host, address.port), timeout=1.0).close()
    except OSError:
        return False
    return True

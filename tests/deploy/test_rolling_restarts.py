"""Rolling restarts under streaming load behind a real haproxy and a real nginx: no request fails."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.deploy.proxies import Address, haproxy, nginx, own_address
from tests.deploy.rolling import NUM_CLIENTS, Account, Load
from tests.live_server import LiveServer, start_server, stop_server
from tests.tiny_model import write_tiny_adapter, write_tiny_model

MODELS = ["tiny", "voice", "other"]
# the shipped default is 5: haproxy notices within 0.5 s, and learns it even on a busy machine
DELAY_S = 1.5
# a drain may take long on a busy machine; that it ends by itself is what counts
TIMEOUT_S = 600.0


class Pair:
    """Two servers with the same adapters, each on an address that it keeps over its restarts."""

    def __init__(self, folder: Path, addresses: tuple[Address, Address]) -> None:
        self._folder = folder
        self._addresses = addresses
        self._model = write_tiny_model(folder / "tiny")
        for name, seed in (("voice", 1), ("other", 2)):
            write_tiny_adapter(folder / "adapters", name, rank=4, seed=seed)
        self._servers: dict[int, LiveServer] = {}

    def start(self, number: int) -> None:
        """Start one server."""
        address = self._addresses[number]
        place = ("--host", address.host, "--port", str(address.port))
        drain = ("--drain-delay-s", str(DELAY_S), "--drain-timeout-s", str(TIMEOUT_S))
        # an engine that a busy machine holds up is no hung one
        patience = ("--heartbeat-timeout-s", str(TIMEOUT_S))
        known = ("--preload", str(self._folder / "adapters"), "--dtype", "float32", *patience)
        log, store = self._folder / f"server{number}.log", self._folder / f"store{number}"
        self._servers[number] = start_server(log, self._model, store, *place, *drain, *known)

    def leave(self, number: int) -> None:
        """Send SIGTERM and wait for a clean end inside the grace."""
        server = self._servers.pop(number)
        server.process.send_signal(signal.SIGTERM)
        try:
            assert server.process.wait(TIMEOUT_S) == 0, server.log_tail()
            # whatever was cut would have been told so
            assert "Traceback" not in server.log_path.read_text(encoding="utf-8"), server.log_tail()
        finally:
            stop_server(server)

    def stop(self) -> None:
        """End both."""
        for server in self._servers.values():
            server.process.kill()
            stop_server(server)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Pair, tuple[Address, Address]]]:
    """Start two servers."""
    addresses = (own_address(0), own_address(1))
    servers = Pair(tmp_path, addresses)
    try:
        for number in (0, 1):
            servers.start(number)
        yield servers, addresses
    finally:
        servers.stop()


async def roll(load: Load, restart: Callable[[int], None], num_rounds: int, num_requests: int) -> Account:
    """Restart one server after the other under load, then go on until enough requests were made."""
    await load.learn()
    running = asyncio.create_task(load.run())
    try:
        for number in range(num_rounds):
            before = load.account.num_good
            await asyncio.to_thread(restart, number % 2)
            assert load.account.num_good > before, f"nothing was served during round {number}: {load.account}"
            if (number + 1) % 10 == 0:
                print(f"{number + 1} rounds: {load.account}", flush=True)
        await load.reach(num_requests, running)
    finally:
        load.stop()
        await running
    return load.account


def roll_behind_haproxy(
    folder: Path, pair: tuple[Pair, tuple[Address, Address]], num_rounds: int, num_requests: int
) -> Account:
    """Roll; each restart begins when haproxy holds the other server for well."""
    servers, addresses = pair
    listen = own_address(2)
    started = time.monotonic()
    with haproxy(addresses, listen, folder) as proxy:
        names = ("one", "two")

        def restart(number: int) -> None:
            proxy.wait_until(names[1 - number], "UP")
            servers.leave(number)
            servers.start(number)
            proxy.wait_until(names[number], "UP")

        account = asyncio.run(roll(Load(f"http://{listen}", MODELS), restart, num_rounds, num_requests))
        tried_again = sum(int(row["wretr"] or 0) for row in proxy.rows().values())
    seconds = time.monotonic() - started
    print(f"{num_rounds} rounds, {account.num_good} streams in {seconds:.0f} s, {tried_again} tried again by haproxy")
    return account


@pytest.mark.timeout(2400)
def test_no_stream_fails_over_twenty_rolling_restarts_behind_haproxy(
    tmp_path: Path, pair: tuple[Pair, tuple[Address, Address]]
) -> None:
    account = roll_behind_haproxy(tmp_path, pair, num_rounds=20, num_requests=10_000)
    assert account.failures == {}
    assert account.num_good >= 10_000


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_no_stream_fails_over_two_hundred_rolling_restarts_behind_haproxy(
    tmp_path: Path, pair: tuple[Pair, tuple[Address, Address]]
) -> None:
    account = roll_behind_haproxy(tmp_path, pair, num_rounds=200, num_requests=20_000)
    assert account.failures == {}
    assert account.num_good >= 20_000


@pytest.mark.timeout(1200)
def test_nginx_which_only_learns_from_refusals_loses_none_either(
    tmp_path: Path, pair: tuple[Pair, tuple[Address, Address]]
) -> None:
    servers, addresses = pair
    listen = own_address(2)
    with ExitStack() as stack:
        stack.enter_context(nginx(addresses, listen, tmp_path))

        def restart(number: int) -> None:
            servers.leave(number)
            servers.start(number)

        account = asyncio.run(roll(Load(f"http://{listen}", MODELS), restart, num_rounds=4, num_requests=500))
    assert account.failures == {}
    assert account.num_good >= 500 > NUM_CLIENTS

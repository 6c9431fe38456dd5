"""Requests begin one in a turn of the loop, in their order."""

import asyncio
import socket

from serve.api.beginnings import Beginnings
from serve.config import LimitsConfig
from tests.api_guard.wire import GET, read_all, served

LAST_GET = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


def test_one_that_comes_alone_begins_at_once() -> None:
    async def run() -> None:
        beginnings = Beginnings()
        for number in range(3):
            begun: list[int] = []
            beginnings.add(lambda begun=begun, number=number: begun.append(number))  # type: ignore[misc]
            assert begun == [number]
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(run())


def test_of_a_crowd_one_begins_in_a_turn_in_order_and_the_loop_looks_at_its_sockets_between() -> None:
    async def run() -> None:
        beginnings, begun, found_after = Beginnings(), list[int](), list[int]()
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:

            def look() -> None:
                ours.recv(1)
                found_after.append(len(begun))

            loop.add_reader(ours, look)
            for number in range(50):
                beginnings.add(lambda number=number: begun.append(number))  # type: ignore[misc]
            assert begun == [0]
            theirs.send(b"x")
            for turn in range(2, 50):
                await asyncio.sleep(0)
                assert len(begun) <= turn
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            loop.remove_reader(ours)
        assert begun == [*range(50)]
        assert found_after and found_after[0] < 5

    asyncio.run(run())


def test_one_that_fails_to_begin_keeps_no_other_from_it() -> None:
    async def run() -> None:
        beginnings, begun = Beginnings(), list[int]()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        beginnings.add(lambda: None)
        beginnings.add(lambda: begun.append(1 // 0))
        beginnings.add(lambda: begun.append(2))
        for _ in range(4):
            await asyncio.sleep(0)
        assert begun == [2]

    asyncio.run(run())


def test_a_crowd_of_connections_is_answered_to_the_last() -> None:
    with served(LimitsConfig()) as server:
        peers = [server.connect() for _ in range(40)]
        for peer in peers:
            peer.sendall(LAST_GET)
        for peer in peers:
            with peer:
                assert read_all(peer).endswith(b"\r\n\r\n0")
    assert server.seen == [("/ok", 0)] * 40


def test_a_client_that_leaves_before_its_request_began_harms_nobody() -> None:
    with served(LimitsConfig()) as server:
        peers = [server.connect() for _ in range(20)]
        for peer in peers:
            peer.sendall(LAST_GET)
            peer.close()
        assert server.ask(LAST_GET).endswith(b"\r\n\r\n0")

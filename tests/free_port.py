"""A TCP port for a program that must be told its port before it listens.

Owns the choice. Invariant: it lies below the ports that the kernel hands out by itself, so nothing that is started or
connected meanwhile, here or in another test process, takes it by chance.
"""

import random
import socket
from pathlib import Path

_LOWEST = 10_000


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0]) - 1
    choose = random.SystemRandom()
    while True:
        port = choose.randint(_LOWEST, highest) if highest > _LOWEST else 0
        try:
            with socket.create_server(("127.0.0.1", port)) as probe:
                return int(probe.getsockname()[1])
        except OSError:
            continue

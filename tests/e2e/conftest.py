"""What real servers share in these tests: one Redis, one object store.

Owns how long they live. Invariant: each test has its own, and they end with it whatever state they are in.
"""

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer, redis_of_replicas
from tests.s3_server import S3Server, s3_in_environment


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """Return a Redis whose user may do what replicas do."""
    server = redis_of_replicas()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Return an object store, which this process's environment names."""
    server = s3_in_environment(monkeypatch)
    try:
        yield server
    finally:
        server.close()

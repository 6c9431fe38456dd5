"""The way to what needs the Redis client, which is an extra that single servers do not have.

Owns the message when it is missing. Invariant: importing this needs no Redis client.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters_store.registry_redis import SharedRegistry
from serve.errors import StartError


def open_shared(store: Path, redis_url: str, blobs_url: str | None) -> SharedRegistry:
    """Open the registry that replicas share, and follow it; raises StartError, StoreError."""
    with _client_installed():
        from adapters_store.registry_replicas import open_shared as open_it  # noqa: PLC0415
    return open_it(store, redis_url, blobs_url=blobs_url)


def connect(registry: SharedRegistry, redis_url: str) -> None:
    """Let a registry change names without following others; raises StartError, StoreError."""
    with _client_installed():
        from adapters_store.registry_replicas import connect as connect_it  # noqa: PLC0415
    connect_it(registry, redis_url, follow=False)


def rebuild_journal(store: Path, redis_url: str) -> SharedRegistry:
    """Make the shared registry from what the folder holds; raises StartError, StoreError."""
    with _client_installed():
        from adapters_store.registry_replicas import rebuild_journal as rebuild_it  # noqa: PLC0415
    return rebuild_it(store, redis_url)


def acl_line(user: str) -> str:
    """Return the Redis command that makes the replicas' user; raises StartError."""
    with _client_installed():
        from adapters_store.redis_head import acl_line as line  # noqa: PLC0415
        from serve.tenants.redis_accounts import COMMANDS  # noqa: PLC0415
    return line(user, COMMANDS)


@contextmanager
def _client_installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise StartError("sharing a store through Redis needs its client: pip install 'chorale[redis]'") from error

"""The number of a store's newest change, in Redis: how replicas learn at once that the shared journal has grown.

Owns the connections and the one key, a stream of at most one entry whose id is the number. Invariants: the number only
grows (XADD refuses an id that is not above the last one, so no script and no transaction is needed), and it is nothing
but a hint: whatever Redis loses is derived from the journal again, and no content of an adapter is ever believed from
there. Commands: XADD, XREAD, XREVRANGE, DEL, nothing else (`acl_line`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from adapters_store.errors import InvalidOption, RegistryUnavailable
from adapters_store.redis_url import masked

KEY_PREFIX = "chorale:"
COMMANDS = ("del", "xadd", "xread", "xrevrange")
_TIMEOUT_S = 1.0
# Redis answers this to an id that somebody else has written already
_NOT_ABOVE = "equal or smaller"


class RedisHead:
    """The newest change's number of one store. Thread-safe; every method but `close` raises RegistryUnavailable."""

    def __init__(self, url: str, store_id: str, *, wait_s: float = 0.25, timeout_s: float = _TIMEOUT_S) -> None:
        """Connect lazily.

        Args:
            wait_s: how long `wait` waits at most.
            timeout_s: after how long a Redis that says nothing is away.
        Raises:
            InvalidOption: the URL is none of redis://, rediss:// or unix://.
        """
        self._key = f"{KEY_PREFIX}{store_id}:head"
        self._wait_ms = max(1, int(wait_s * 1000))
        self._commands = _connect(url, timeout_s)
        # a wait that Redis has not ended itself means that it is frozen
        self._waiting = _connect(url, wait_s + timeout_s)

    def top(self) -> int:
        """Return the newest number that Redis knows; -1: none."""
        with _unavailable():
            newest = self._commands.xrevrange(self._key, count=1)
        return _number(newest[0][0]) if newest else -1

    def announce(self, number: int) -> None:
        """Say that the journal has entry `number`; nothing changes if Redis knows of it or of a later one."""
        if number <= 0:
            # a stream has no id 0, and nobody waits for a store's founding
            return
        with _unavailable():
            try:
                self._commands.xadd(self._key, {"v": "1"}, id=f"{number}-0", maxlen=1, approximate=False)
            except redis.ResponseError as error:
                if _NOT_ABOVE not in str(error):
                    raise

    def wait(self, after: int) -> None:
        """Return as soon as a number above `after` is announced, or after `wait_s`."""
        with _unavailable():
            self._waiting.xread({self._key: f"{max(after, 0)}-0"}, count=1, block=self._wait_ms)

    def forget(self) -> None:
        """Remove the number, so that the next one announced counts whatever it is."""
        with _unavailable():
            self._commands.delete(self._key)

    def close(self) -> None:
        """Give back the connections."""
        self._commands.close()
        self._waiting.close()


def acl_line(user: str, also: Iterable[str] = ()) -> str:
    """Return what makes a Redis user that can do what a replica does and nothing else; the password is to be put in.

    Args:
        also: commands that others send on the replica's behalf, over keys of the same prefix.
    """
    allowed = " ".join(f"+{command}" for command in sorted({*COMMANDS, *also}))
    return f"ACL SETUSER {user} reset on >PASSWORD ~{KEY_PREFIX}* resetchannels -@all {allowed}"


def is_refused(error: RegistryUnavailable) -> bool:
    """Return whether Redis answered, and said that this user may not: waiting does not help."""
    return isinstance(error.__cause__, redis.AuthenticationError | redis.exceptions.NoPermissionError)


def _connect(url: str, timeout_s: float) -> redis.Redis:
    try:
        return redis.Redis.from_url(
            url,
            # RESP2 needs no HELLO, and without a driver's name no CLIENT SETINFO: fewer commands to allow
            protocol=2,
            driver_info=None,
            socket_timeout=timeout_s,
            socket_connect_timeout=_TIMEOUT_S,
            # once more at once: the first command after Redis has come back finds a dead connection
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
    except ValueError as error:
        raise InvalidOption(
            f"the Redis URL {masked(url)} cannot be used; it looks like redis://user:password@host:6379, "
            "rediss://... or unix:///path",
            param="redis_url",
        ) from error


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise RegistryUnavailable() from error


def _number(stream_id: bytes | str | None) -> int:
    text = stream_id.decode() if isinstance(stream_id, bytes) else str(stream_id)
    return int(text.partition("-")[0])

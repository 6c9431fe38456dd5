"""How a replica hears of changes: it waits at Redis, looks into the journal, and bridges the time that Redis is away.

Owns the rounds and the thread that makes them. Invariants: a round ends within bounds whatever Redis and the folder do,
and no failure ends the thread; while Redis is away the folder alone is looked at, with jittered pauses; when Redis is
back, what it lacks is told to it again, so that replicas that heard nothing do.
"""

import logging
import random
import threading
from collections.abc import Callable
from typing import Protocol

from adapters_store.errors import RegistryUnavailable, StoreError
from adapters_store.registry_redis import SharedRegistry

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
# Redis names a change that the folder does not show yet: network file systems take a moment
LAG_PAUSE_S = 0.1


class WaitingHead(Protocol):
    """What a follower needs of Redis."""

    def top(self) -> int:
        """Return the newest number told; -1: none. Raises RegistryUnavailable."""
        ...

    def announce(self, number: int) -> None:
        """Tell it; raises RegistryUnavailable."""
        ...

    def wait(self, after: int) -> None:
        """Return when there is news after that number, or nothing came for a while; raises RegistryUnavailable."""
        ...


class Follower:
    """One replica's ear. `round` is all its logic; `start` lets a thread make rounds until `stop`."""

    def __init__(
        self, registry: SharedRegistry, head: WaitingHead, *, jitter: Callable[[], float] = random.random
    ) -> None:
        """Follow for `registry`.

        Args:
            jitter: a number from 0 to 1 for each pause; replaced by tests.
        """
        self._registry = registry
        self._head = head
        self._jitter = jitter
        self._num_failures = 0
        self._said = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry-follower", daemon=True)

    def round(self) -> float:
        """Hear what is new and follow it; return after how many seconds to come again."""
        try:
            self._head.wait(self._registry.number)
            top = self._head.top()
            self._registry.mark(is_away=False)
            self._registry.catch_up()
            if top < self._registry.number:
                self._head.announce(self._registry.number)
        except RegistryUnavailable as error:
            self._registry.mark(is_away=True)
            reason = error.__cause__ or error.message
            self._say(f"Redis does not answer ({reason}); known adapters are served meanwhile")
            return self._bridge()
        except StoreError as error:
            self._say(error.message)
            return self._pause()
        self._num_failures = 0
        if top > self._registry.number:
            self._say(f"Redis knows of change {top}, the shared folder shows {self._registry.number} here")
            return LAG_PAUSE_S
        self._say("")
        return 0.0

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns within about two seconds, also if Redis is frozen."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _bridge(self) -> float:
        """Look at the folder alone."""
        try:
            self._registry.catch_up()
        except StoreError as error:
            self._say(error.message)
        return self._pause()

    def _pause(self) -> float:
        longest = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._num_failures, 10))
        self._num_failures += 1
        # at least half of it: all jitter would let some replicas hammer
        return longest * (0.5 + 0.5 * self._jitter())

    def _say(self, message: str) -> None:
        """Log each state once, not each round."""
        if message == self._said:
            return
        if message:
            logger.warning("%s", message)
        else:
            logger.info("following the shared registry again, at change %d", self._registry.number)
        self._said = message

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                pause_s = self.round()
            except Exception:
                # our bug: said once per round with its trace, and no reason to go deaf
                logger.exception("a round of following the shared registry failed; the next one is tried")
                pause_s = self._pause()
            self._stopped.wait(pause_s)

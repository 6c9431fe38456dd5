"""How a replica hears of changes: it waits at Redis, and looks into the journal by itself, whatever Redis does.

Owns the rounds and looks, and a thread for each of the two, so that no time limit or pause of a Redis that is away, or
just back, holds up a look. Invariants: what the journal shows is known here a look later at the latest; a round ends
within bounds, and no failure ends a thread; when Redis is back, what it lacks is told to it again.
"""

import logging
import random
import threading
from collections.abc import Callable
from typing import Protocol

from adapters_store.errors import RegistryUnavailable, StoreError
from adapters_store.registry_redis import SharedRegistry

logger = logging.getLogger(__name__)

# what no bell told is found after this long: a fifth of the second that a publication may take
LOOK_PAUSE_S = 0.2
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
# a frozen Redis is noticed well within this
STOP_S = 5.0
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
    """One replica's ear and eye. `round` and `look` are its logic; `start` lets threads repeat them until `stop`."""

    def __init__(
        self,
        registry: SharedRegistry,
        head: WaitingHead,
        *,
        look_pause_s: float = LOOK_PAUSE_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Follow for `registry`.

        Args:
            look_pause_s: how long between two looks into the journal.
            jitter: a number from 0 to 1 for each pause; replaced by tests.
        """
        self._registry = registry
        self._head = head
        self._look_pause_s = look_pause_s
        self._jitter = jitter
        self._num_failures = 0
        # what each of the two said last
        self._said: dict[str, str] = {}
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(self.round,), name="registry-ear", daemon=True),
            threading.Thread(target=self._repeat, args=(self.look,), name="registry-eye", daemon=True),
        ]

    def look(self) -> float:
        """Follow what the journal shows; return after how many seconds to come again."""
        try:
            self._registry.catch_up()
        except StoreError as error:
            self._say("eye", error.message)
        else:
            self._say("eye", "")
        return self._look_pause_s

    def round(self) -> float:
        """Hear what is new and follow it; return after how many seconds to come again."""
        try:
            self._head.wait(self._registry.number)
            top = self._head.top()
            self._registry.mark(is_away=False, told=top)
            self._registry.catch_up()
            if top < self._registry.number:
                self._head.announce(self._registry.number)
        except RegistryUnavailable as error:
            self._registry.mark(is_away=True)
            reason = error.__cause__ or error.message
            self._say("ear", f"Redis does not answer ({reason}); known adapters are served meanwhile")
            return self._pause()
        except StoreError as error:
            self._say("ear", error.message)
            return self._pause()
        self._num_failures = 0
        if top > self._registry.number:
            self._say("ear", f"Redis knows of change {top}, the shared folder shows {self._registry.number} here")
            return LAG_PAUSE_S
        self._say("ear", "")
        return 0.0

    def start(self) -> None:
        """Begin to follow."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; returns within seconds: what waits for a silent object store ends by itself, later."""
        self._stopped.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_S)

    def _pause(self) -> float:
        longest = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._num_failures, 10))
        self._num_failures += 1
        # at least half of it: all jitter would let some replicas hammer
        return longest * (0.5 + 0.5 * self._jitter())

    def _say(self, who: str, message: str) -> None:
        """Log each state once, not each time."""
        if message == self._said.get(who, ""):
            return
        if message:
            logger.warning("%s", message)
        else:
            logger.info("following the shared registry again, at change %d", self._registry.number)
        self._said[who] = message

    def _repeat(self, act: Callable[[], float]) -> None:
        while not self._stopped.is_set():
            try:
                pause_s = act()
            except Exception:
                # our bug: said each time with its trace, and no reason to go deaf or blind
                logger.exception("following the shared registry failed; it is tried again")
                pause_s = MAX_PAUSE_S
            self._stopped.wait(pause_s)

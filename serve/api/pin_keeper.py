"""Keeps the operator's pins over restarts, and the same at all servers over one store: what is kept there is the wish.

Owns the task that compares it with what this server's engine holds. Invariants: a pin that was answered is kept; the
wish is tried again and again, and what cannot be held here (no room, no such adapter, its signature does not count)
stops nothing else and leaves the wish alone.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection

from adapters_store.errors import StoreError
from adapters_store.pins import Pins, PinStore
from serve.api.engine_gateway import EngineGateway
from serve.errors import ServeError

logger = logging.getLogger(__name__)

_POLL_S, _RETRY_S = 0.5, 30.0


class PinKeeper:
    """The pins of one server. Event loop only."""

    def __init__(self, pins: PinStore, engine: EngineGateway, check: Callable[[str], None]) -> None:
        """Prepare.

        Args:
            check: raises StoreError if an adapter of this digest may not be served here.
        """
        self._pins = pins
        self._engine = engine
        self._check = check
        # the file and the engine change together
        self._changing = asyncio.Lock()
        # what the engine was told of in full; an engine that starts again is told by its desk
        self._told: Pins | None = None
        self._later: dict[str, float] = {}
        self._complaint = ""

    async def pin(self, digest: str) -> None:
        """Pin an adapter here, and keep that; raises what `AdapterDesk.pin` raises, StoreError."""
        async with self._changing:
            await self._engine.desk.pin(digest)
            # until it is kept the next round compares everything, and takes back what is not
            self._told = None
            await asyncio.to_thread(self._pins.add, digest)
            await self._settle()

    async def unpin(self, digest: str) -> None:
        """Take a pin back, for good; raises what `AdapterDesk.unpin` raises, StoreError."""
        async with self._changing:
            await asyncio.to_thread(self._pins.discard, (digest,))
            await self._engine.desk.unpin(digest)
            await self._settle()

    async def forget(self, digests: Collection[str]) -> None:
        """Forget the pins of adapters that are deleted; raises StoreError."""
        async with self._changing:
            await asyncio.to_thread(self._pins.discard, digests)

    async def follow(self) -> None:
        """Compare and correct until cancelled."""
        while True:
            try:
                await self._round()
                self._complaint = ""
            except (StoreError, ServeError) as error:
                if error.message != self._complaint:
                    logger.warning("pins: %s", error.message)
                self._complaint = error.message
            await asyncio.sleep(_POLL_S)

    async def _round(self) -> None:
        desk = self._engine.desk
        if not self._engine.is_ready:
            return
        async with self._changing:
            wanted = await asyncio.to_thread(self._pins.read)
            if wanted == self._told:
                return
            for digest in desk.pinned:
                if digest not in wanted:
                    await desk.unpin(digest)
            for digest in wanted:
                if not desk.is_pinned(digest) and time.monotonic() >= self._later.get(digest, 0.0):
                    await self._try(digest)
            self._later = {digest: at_s for digest, at_s in self._later.items() if digest in wanted}
            self._told = None if self._later else wanted

    async def _settle(self) -> None:
        """Note it if the engine has been told of all that the file says."""
        wanted = await asyncio.to_thread(self._pins.read)
        if set(wanted) == set(self._engine.desk.pinned):
            self._told = wanted

    async def _try(self, digest: str) -> None:
        try:
            await asyncio.to_thread(self._check, digest)
            await self._engine.desk.pin(digest)
            self._later.pop(digest, None)
        except (StoreError, ServeError) as error:
            if digest not in self._later:
                logger.warning("adapter sha256:%s is to be pinned, and is not: %s", digest, error.message)
            self._later[digest] = time.monotonic() + _RETRY_S


@contextlib.asynccontextmanager
async def keeping_pins(keeper: PinKeeper) -> AsyncIterator[None]:
    """Keep them for as long as the block runs."""
    task = asyncio.create_task(keeper.follow())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

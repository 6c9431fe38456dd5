"""Room in the adapter arena: who gets which extent, who waits for one, and what its bytes must wait for.

Owns the extents, the line of loads that wait until others have moved, and the fence of the newest free bytes, all under
one lock: the loader's thread and the step's both take room. Invariants: a load waits only while moving others makes
room for it; none passes one that waits; whoever gets bytes gets the fence behind which they are free.
"""

import threading
from collections import deque
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum, auto

from adapter_kernels.gpu.copies import Fence
from adapter_kernels.gpu.image_layout import ImageLayout
from adapter_kernels.gpu.placed_adapter import PlacedAdapter
from serve.engine.extents import Extents, Move


class Place(Enum):
    """What a load that asked for room got."""

    EXTENT = auto()
    LINE = auto()
    REFUSAL = auto()


@dataclass(slots=True, eq=False)
class Load:
    """One load from start to end; `begin` is None until it has an extent, `after` the fence of that extent's bytes."""

    digest: str
    slot: int
    begin_s: float = 0.0
    rank: int = 0
    layout: ImageLayout | None = None
    adapter: PlacedAdapter | None = None
    begin: int | None = None
    after: Fence | None = None
    uploaded: Fence | None = None
    error: str | None = None
    is_out_of_room: bool = False
    is_dropped: bool = False

    @property
    def num_bytes(self) -> int:
        """What it takes in the arena, 0 until that is known."""
        return 0 if self.layout is None else self.layout.num_bytes


class ArenaRoom:
    """The extents of one arena. Thread-safe."""

    def __init__(self, num_bytes: int) -> None:
        self._lock = threading.Lock()
        self._extents = Extents(num_bytes)
        self.num_bytes = self._extents.num_bytes
        self._waiting: deque[Load] = deque()
        self._freed: Fence | None = None

    @property
    def num_bytes_free(self) -> int:
        """Bytes in no extent."""
        with self._lock:
            return self._extents.num_bytes_free

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest free piece."""
        with self._lock:
            return self._extents.largest_hole

    def place(self, load: Load) -> Place:
        """Give a load an extent, or a place in the line, or refuse it in `load.error`; a dropped one gets nothing."""
        with self._lock:
            if load.is_dropped or self._refuse(load):
                return Place.REFUSAL
            # whoever waits already is first: its room must not go to smaller ones
            if self._waiting or not self._acquire(load):
                self._waiting.append(load)
                return Place.LINE
            return Place.EXTENT

    def serve_line(self) -> list[Load]:
        """Return the loads that leave the line now: with an extent, or refused in `error`."""
        served = []
        with self._lock:
            while self._waiting and (self._refuse(self._waiting[0]) or self._acquire(self._waiting[0])):
                served.append(self._waiting.popleft())
        return served

    def abandon(self, load: Load) -> None:
        """Mark a load that nobody wants any more; it leaves the line, and gets no extent."""
        with self._lock:
            load.is_dropped = True
            if load in self._waiting:
                self._waiting.remove(load)

    def release(self, begin: int, freed: Fence) -> None:
        """Free an extent whose bytes may be read until `freed`, a fence recorded before this call."""
        with self._lock:
            self._freed = freed
            self._extents.release(begin)

    def open_move(self, movable: AbstractSet[int]) -> Move | None:
        """Begin the next move for the first load in the line; extents that begin elsewhere stay where they are."""
        with self._lock:
            if not self._waiting:
                return None
            return self._extents.open_move(self._waiting[0].num_bytes, self._extents.begins - movable)

    def close_move(self, freed: Fence) -> None:
        """End the open move; its former bytes are read and written until `freed`."""
        with self._lock:
            self._freed = freed
            self._extents.close_move()

    def check_invariants(self, held: dict[int, int]) -> None:
        """Check the extents, and that they are exactly `held`: bytes by begin."""
        with self._lock:
            self._extents.check_invariants()
            assert self._extents.begins == held.keys(), f"extents at {self._extents.begins}, adapters at {held}"
            used = self._extents.num_bytes - self._extents.num_bytes_free
            assert used == sum(held.values()), f"{used} bytes are used, adapters hold {sum(held.values())}"

    def _refuse(self, load: Load) -> bool:
        """Fail a load for which moving others would not make room."""
        free, total = self._extents.num_bytes_free, self._extents.num_bytes
        if load.num_bytes <= free:
            return False
        load.is_out_of_room = load.num_bytes <= total
        held = f"of which {free} are free now" if load.is_out_of_room else "so it can never fit"
        load.error = (
            f"the adapter takes {load.num_bytes} bytes on the device; the arena has {total}, {held} "
            "(--adapter-device-bytes)"
        )
        return True

    def _acquire(self, load: Load) -> bool:
        load.begin = self._extents.acquire(load.num_bytes)
        # all bytes are freed in the order of one stream: behind the newest fence the older ones are free too
        load.after = self._freed
        return load.begin is not None

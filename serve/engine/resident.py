"""One adapter in a tier of memory as the pure engine sees it, and the parts of the torch side that move its bytes.

Owns the shapes only. Invariant: a resident that is not ready has no pins.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from serve.engine.plan import FetchResult


class AdapterLoader(Protocol):
    """The part of the executor that moves adapter bytes to the device."""

    def start_load(self, digest: str, slot: int) -> None:
        """Begin to bring an adapter's image into `slot`; returns at once."""
        ...

    def drop(self, digest: str, slot: int) -> None:
        """Free the slot's image."""
        ...


class ImageFetcher(Protocol):
    """Who brings images from the store into host memory, beside the steps."""

    def start_fetch(self, digest: str) -> None:
        """Begin to read and verify an image; returns at once."""
        ...

    def poll(self) -> list[FetchResult]:
        """Return fetches that ended since the last call."""
        ...

    def drop(self, digest: str) -> None:
        """Free an image; no load under way reads it."""
        ...


class Residency(Enum):
    """Where an adapter is in a tier. ABSENT as an answer of `want` means: no room to bring it there now."""

    ABSENT = auto()
    LOADING = auto()
    READY = auto()


@dataclass(slots=True)
class Resident:
    """One occupied adapter slot; `num_bytes` and `rank` are 0 until a first load told them."""

    slot: int
    num_bytes: int = 0
    rank: int = 0
    num_pins: int = 0
    is_ready: bool = False


@dataclass(slots=True)
class HostImage:
    """One image in host memory; `num_bytes` and `rank` are 0 until a first fetch told them."""

    num_bytes: int = 0
    rank: int = 0
    # loads to the device that read it
    num_readers: int = 0
    is_here: bool = False
    # why it goes as soon as it may; None: it stays
    leaves_for: str | None = None

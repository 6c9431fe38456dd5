"""One adapter in memory as the tiers see it, and the part of the executor that they drive.

Owns the shapes only. Invariant: a resident that is not ready has no pins.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol


class AdapterLoader(Protocol):
    """The part of the executor that moves adapter bytes."""

    def start_load(self, digest: str, slot: int) -> None:
        """Begin to bring an adapter's image into `slot`; returns at once."""
        ...

    def drop(self, digest: str, slot: int) -> None:
        """Free the slot's image."""
        ...


class Residency(Enum):
    """Where an adapter is. ABSENT as an answer of `want` means: no room to load it now."""

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

"""The adapters that the operator wants in memory always: which, how many, and which of them cannot be held.

Owns the wishes, not the memory: the tiers load what is wished and evict nothing that is held. Invariants: pins leave at
least one adapter slot free, and those held take at most half of the adapter bytes, so every other adapter that fits
into the rest can still be served; a pin stays until it is taken back, also when it cannot be held.
"""

from collections.abc import Collection
from dataclasses import dataclass

from serve.adapter_messages import PinState


@dataclass(slots=True)
class _Pin:
    """One pin; 0 bytes: not known yet. With an error it holds nothing and is not tried again by itself."""

    num_bytes: int
    error: str | None = None


class OperatorPins:
    """What is pinned by the operator."""

    def __init__(self, num_slots: int, max_bytes: int) -> None:
        self._num_slots = num_slots
        self._max_pins = max(0, num_slots - 1)
        self._max_bytes = max_bytes // 2
        self._pins: dict[str, _Pin] = {}
        # grows whenever there is less room for others than before
        self.num_takes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._pins

    def add(self, digest: str, num_bytes: int) -> str | None:
        """Pin an adapter, or try again one that could not be held; return the reason of a refusal, else None."""
        num_others = len(self._pins) - (digest in self._pins)
        if num_others >= self._max_pins:
            return (
                f"{num_others} adapters are pinned already, the limit is {self._max_pins}: one of {self._num_slots} "
                "adapter slots stays free; unpin another one first"
            )
        error = self._over_share(digest, num_bytes)
        if error is None:
            self._pins[digest] = _Pin(num_bytes)
            self.num_takes += 1
        return error

    def discard(self, digest: str) -> None:
        """Take a pin back, if there is one."""
        self._pins.pop(digest, None)

    def weigh(self, digest: str, num_bytes: int) -> None:
        """Learn the size of an adapter that could be loaded; a pin of it is good again, unless it proves too large."""
        if digest in self._pins:
            self._pins[digest] = _Pin(num_bytes, self._over_share(digest, num_bytes))
            self.num_takes += 1

    def fail(self, digest: str, reason: str) -> None:
        """Note that a pinned adapter could not be loaded."""
        if digest in self._pins:
            self._pins[digest].error = reason

    def holds(self, digest: str) -> bool:
        """Say whether an adapter must not be evicted."""
        pin = self._pins.get(digest)
        return pin is not None and pin.error is None

    def held(self) -> list[str]:
        """Return the adapters to load and to keep, oldest pin first."""
        return [digest for digest, pin in self._pins.items() if pin.error is None]

    def num_beside(self, digests: Collection[str]) -> int:
        """Return how many others than these are held."""
        return sum(digest not in digests for digest in self.held())

    def num_bytes_beside(self, digests: Collection[str]) -> int:
        """Return the bytes, as far as known, of those held besides these."""
        return sum(self._pins[digest].num_bytes for digest in self.held() if digest not in digests)

    def states(self) -> list[PinState]:
        """Describe every pin, for the heartbeat."""
        return [PinState(digest, pin.error) for digest, pin in self._pins.items()]

    def check_invariants(self) -> None:
        """Assert the bounds."""
        num_pins = len(self._pins)
        assert num_pins == 0 or num_pins < self._num_slots, f"{num_pins} pins leave no slot of {self._num_slots} free"
        num_bytes = self.num_bytes_beside(())
        assert num_bytes <= self._max_bytes, f"pins hold {num_bytes} bytes of at most {self._max_bytes}"

    def _over_share(self, digest: str, num_bytes: int) -> str | None:
        num_others = self.num_bytes_beside((digest,))
        if num_bytes + num_others <= self._max_bytes:
            return None
        return (
            f"the adapter takes {num_bytes} bytes in memory and other pinned ones {num_others}; pins may hold at most "
            f"{self._max_bytes}, half of the adapter bytes (--adapter-device-bytes)"
        )

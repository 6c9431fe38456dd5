"""Who asked first for an adapter, and whom that lets push out whom: the order that both tiers of memory follow.

Owns the places of the wishes and the search for victims, for one walk over the waiting line. Invariant: a wish pushes
out no adapter of an earlier one, so two waiting sequences cannot push out each other's adapter for ever.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


class WishOrder:
    """The place of each digest that the last walk asked for; all others come behind them."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def begin_walk(self) -> None:
        """Forget the places."""
        self._places = {}

    def ask(self, digest: str) -> None:
        """Give a digest the next place, unless it has one."""
        self._places.setdefault(digest, len(self._places))

    def rank(self, digests: Iterable[str]) -> None:
        """Give several digests their places, in this order."""
        for digest in digests:
            self.ask(digest)

    def is_before(self, digest: str, other: str) -> bool:
        """Say whether `digest` has a better right to its room than `other`."""
        return self._place(digest) < self._place(other)

    def _place(self, digest: str) -> int:
        return self._places.get(digest, len(self._places))


@dataclass(frozen=True, slots=True)
class Room:
    """A number of adapters and their bytes: of what is free, or of what is needed."""

    count: int
    num_bytes: int


def find_victims(
    candidates: Iterator[str], free: Room, needed: Room, freed_by: Callable[[str], int | None]
) -> list[str] | None:
    """Choose who goes so that there is room: the first candidates that may go, as few as suffice.

    Args:
        candidates: all residents, the best one to drop first.
        freed_by: bytes that dropping one frees; None: it stays.
    Returns:
        None when all that may go would not suffice; then none is to go.
    """
    victims: list[str] = []
    count, num_bytes = free.count, free.num_bytes
    for digest in candidates:
        if count >= needed.count and num_bytes >= needed.num_bytes:
            break
        freed = freed_by(digest)
        if freed is not None:
            victims.append(digest)
            count, num_bytes = count + 1, num_bytes + freed
    return victims if count >= needed.count and num_bytes >= needed.num_bytes else None

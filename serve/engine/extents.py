"""Which bytes of the adapter arena are whose: extents by best fit, holes that coalesce, and what moves to make room.

Owns the books, not the bytes: who copies them and when is `device_arena`'s. Invariants: extents and holes are aligned,
never overlap and together cover the arena; two holes never touch; at most one move is open, and nobody gets the bytes
between its target and its source before it is closed.
"""

from bisect import bisect_left
from collections.abc import Container
from dataclasses import dataclass

# what kernels promise the compiler of every offset
ALIGNMENT_BYTES = 128


@dataclass(frozen=True, slots=True)
class Move:
    """An extent that slides down from `source` to `target`; the two ranges may overlap."""

    source: int
    target: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Hole:
    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.begin + self.num_bytes


class Extents:
    """The extents of one arena of fixed size; positions and lengths in bytes."""

    def __init__(self, num_bytes: int) -> None:
        """Begin with one hole; bytes behind the last whole 128 are left alone."""
        self.num_bytes = num_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        # by position
        self._holes = [_Hole(0, self.num_bytes)] if self.num_bytes else []
        self._lengths: dict[int, int] = {}
        self._move: Move | None = None

    @property
    def num_bytes_free(self) -> int:
        """Bytes in no extent, those that an open move is about to free included."""
        opened = 0 if self._move is None else self._move.source - self._move.target
        return sum(hole.num_bytes for hole in self._holes) + opened

    @property
    def largest_hole(self) -> int:
        """The most bytes that `acquire` can give now."""
        return max((hole.num_bytes for hole in self._holes), default=0)

    @property
    def begins(self) -> set[int]:
        """Where extents begin; for the one under way, its target."""
        return set(self._lengths)

    def acquire(self, num_bytes: int) -> int | None:
        """Return where an extent of this length begins, in the smallest hole that takes it; None: no hole does."""
        num_bytes = round_up(num_bytes)
        fitting = [hole for hole in self._holes if hole.num_bytes >= num_bytes]
        if not fitting:
            return None
        hole = min(fitting, key=lambda hole: (hole.num_bytes, hole.begin))
        index = self._holes.index(hole)
        rest = _Hole(hole.begin + num_bytes, hole.num_bytes - num_bytes)
        self._holes[index : index + 1] = [rest] if rest.num_bytes else []
        self._lengths[hole.begin] = num_bytes
        return hole.begin

    def release(self, begin: int) -> None:
        """Give `acquire` back; an extent under way goes with both its places."""
        num_bytes = self._lengths.pop(begin)
        if self._move is not None and self._move.target == begin:
            self._move = None
        self._add_hole(begin, begin + num_bytes)

    def open_move(self, num_bytes: int, fixed: Container[int]) -> Move | None:
        """Begin the next move towards a hole of `num_bytes`; until `close_move` the extent holds both places.

        The extents to move are those of the cheapest window: neighbouring holes that suffice together, with the fewest
        bytes between them. Each move makes that window cheaper, so repeated calls end.

        Args:
            fixed: where extents begin that must not move.
        Returns:
            None when there is such a hole already, or when fixed extents leave no window.
        """
        assert self._move is None, "a move is opened while another is open"
        hole = self._cheapest_window(round_up(num_bytes), fixed)
        if hole is None:
            return None
        length = self._lengths.pop(hole.end)
        self._holes.remove(hole)
        self._lengths[hole.begin] = hole.num_bytes + length
        self._move = Move(hole.end, hole.begin, length)
        return self._move

    def close_move(self) -> None:
        """End the open move: the extent lies at its target alone."""
        assert self._move is not None, "no move is open"
        move, self._move = self._move, None
        end = move.source + move.num_bytes
        self._lengths[move.target] = move.num_bytes
        self._add_hole(move.target + move.num_bytes, end)

    def check_invariants(self) -> None:
        """Rebuild the arena from its parts and compare."""
        holes = {hole.begin: hole.num_bytes for hole in self._holes}
        parts = sorted([*self._lengths.items(), *holes.items()])
        position, was_hole = 0, False
        for begin, length in parts:
            assert begin == position, f"bytes {position} to {begin} are nobody's, or twice somebody's"
            assert length > 0 and length % ALIGNMENT_BYTES == 0, f"{length} bytes at {begin} are not aligned"
            assert not (was_hole and begin in holes), f"two holes touch at {begin}"
            position, was_hole = begin + length, begin in holes
        assert position == self.num_bytes, f"the parts end at {position} of {self.num_bytes}"
        assert self._holes == sorted(self._holes, key=lambda hole: hole.begin), "the holes are out of order"
        if self._move is not None:
            length = self._lengths[self._move.target]
            assert self._move.target + length == self._move.source + self._move.num_bytes, "the open move lost bytes"

    def _cheapest_window(self, num_bytes: int, fixed: Container[int]) -> _Hole | None:
        """Return the first hole of the cheapest window of at least two holes."""
        costs: list[tuple[int, int]] = []
        left = room = cost = 0
        for right, hole in enumerate(self._holes):
            if right and self._is_fixed(self._holes[right - 1].end, hole.begin, fixed):
                left, room, cost = right, 0, 0
            elif right > left:
                cost += hole.begin - self._holes[right - 1].end
            room += hole.num_bytes
            while room - self._holes[left].num_bytes >= num_bytes:
                room -= self._holes[left].num_bytes
                left += 1
                cost -= self._holes[left].begin - self._holes[left - 1].end
            if room >= num_bytes:
                costs.append((cost, left))
        if not costs or min(costs)[0] == 0:
            return None
        return self._holes[min(costs)[1]]

    def _is_fixed(self, begin: int, end: int, fixed: Container[int]) -> bool:
        """Say whether one of the extents that fill [begin, end) must not move."""
        while begin < end:
            if begin in fixed:
                return True
            begin += self._lengths[begin]
        return False

    def _add_hole(self, begin: int, end: int) -> None:
        index = bisect_left(self._holes, begin, key=lambda hole: hole.begin)
        first, last = index, index
        if index > 0 and self._holes[index - 1].end == begin:
            first, begin = index - 1, self._holes[index - 1].begin
        if index < len(self._holes) and self._holes[index].begin == end:
            last, end = index + 1, self._holes[index].end
        self._holes[first:last] = [_Hole(begin, end - begin)]


def round_up(num_bytes: int) -> int:
    """Return the length of the extent that `num_bytes` take; an empty image takes one unit, so as to have a place."""
    return max(1, -(-num_bytes // ALIGNMENT_BYTES)) * ALIGNMENT_BYTES

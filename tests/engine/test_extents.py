"""Extents: random traces against a slow map of every unit, and what compaction may and may not do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.extents import ALIGNMENT_BYTES, Extents, Move, round_up

UNIT = ALIGNMENT_BYTES


class SlowArena:
    """Who owns each unit of the arena; a move copies them one by one, lowest first."""

    def __init__(self, num_units: int) -> None:
        self.units: list[int | None] = [None] * num_units

    def holes(self) -> list[tuple[int, int]]:
        """Begin and length, in units, of every run without owner."""
        found, begin = [], None
        for position, owner in enumerate([*self.units, -1]):
            if owner is None and begin is None:
                begin = position
            elif owner is not None and begin is not None:
                found.append((begin, position - begin))
                begin = None
        return found

    def best_fit(self, num_units: int) -> int | None:
        fitting = [(length, begin) for begin, length in self.holes() if length >= num_units]
        return min(fitting)[1] if fitting else None

    def set(self, begin: int, num_bytes: int, owner: int | None, expected: int | None) -> None:
        for position in range(begin // UNIT, (begin + num_bytes) // UNIT):
            assert self.units[position] == expected, f"unit {position} is {self.units[position]}'s, not {expected}'s"
            self.units[position] = owner


def _compact(extents: Extents, num_bytes: int, fixed: set[int], slow: SlowArena, begins: dict[int, int]) -> int:
    """Move until nothing more moves; returns the bytes moved."""
    moved, owners = 0, {begin: owner for owner, begin in begins.items()}
    while (move := extents.open_move(num_bytes, fixed)) is not None:
        extents.check_invariants()
        assert move.source not in fixed and move.target < move.source
        owner = owners.pop(move.source)
        slow.set(move.source, move.num_bytes, None, owner)
        slow.set(move.target, move.num_bytes, owner, None)
        owners[move.target] = owner
        begins[owner] = move.target
        moved += move.num_bytes
        extents.close_move()
        extents.check_invariants()
    return moved


Operation = tuple[str, int]
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["acquire", "acquire", "release", "compact"]), st.integers(1, 14)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(1, 40), st.integers(0, 3))
def test_a_random_trace_agrees_with_the_slow_arena(operations: list[Operation], num_units: int, fixed_of: int) -> None:
    extents, slow = Extents(num_units * UNIT), SlowArena(num_units)
    begins: dict[int, int] = {}
    for owner, (name, number) in enumerate(operations):
        if name == "acquire":
            expected = slow.best_fit(number)
            begin = extents.acquire(number * UNIT - 1)
            assert begin == (None if expected is None else expected * UNIT)
            if begin is not None:
                slow.set(begin, number * UNIT, owner, None)
                begins[owner] = begin
        elif name == "release" and begins:
            owner = list(begins)[number % len(begins)]
            begin = begins.pop(owner)
            slow.units = [None if unit == owner else unit for unit in slow.units]
            extents.release(begin)
        elif name == "compact":
            fixed = {begin for owner, begin in begins.items() if fixed_of and owner % (fixed_of + 1) == 0}
            room = extents.num_bytes_free
            _compact(extents, number * UNIT, fixed, slow, begins)
            assert extents.num_bytes_free == room
            if not fixed:
                assert (extents.largest_hole >= number * UNIT) == (room >= number * UNIT)
        extents.check_invariants()
        assert extents.num_bytes_free == slow.units.count(None) * UNIT
        assert extents.largest_hole == max((length for _, length in slow.holes()), default=0) * UNIT


def _filled(lengths: list[int]) -> tuple[Extents, list[int]]:
    """An arena full of extents of these lengths, in units."""
    extents = Extents(sum(lengths) * UNIT)
    begins = [extents.acquire(length * UNIT) for length in lengths]
    return extents, [begin for begin in begins if begin is not None]


def test_a_large_extent_moves_only_what_the_cheapest_window_holds() -> None:
    # units: hole 2, a large extent of 9, hole 1, a small one of 1, hole 2
    extents, begins = _filled([2, 9, 1, 1, 2])
    for index in (0, 2, 4):
        extents.release(begins[index])
    assert extents.acquire(3 * UNIT) is None
    assert extents.open_move(3 * UNIT, ()) == Move(source=12 * UNIT, target=11 * UNIT, num_bytes=UNIT)
    extents.close_move()
    assert extents.acquire(3 * UNIT) == 12 * UNIT
    extents.check_invariants()


def test_extents_that_must_not_move_are_worked_around_or_waited_for() -> None:
    extents, begins = _filled([2, 9, 1, 1, 2])
    for index in (0, 2, 4):
        extents.release(begins[index])
    move = extents.open_move(3 * UNIT, {begins[3]})
    assert move is not None and move.source == begins[1]
    extents.close_move()
    assert extents.open_move(5 * UNIT, {begins[3]}) is None
    assert extents.open_move(5 * UNIT, ()) is not None


def test_nobody_gets_the_bytes_of_an_open_move() -> None:
    extents, begins = _filled([2, 3, 2])
    extents.release(begins[0])
    extents.release(begins[2])
    move = extents.open_move(4 * UNIT, ())
    assert move is not None
    assert extents.num_bytes_free == 4 * UNIT and extents.largest_hole == 2 * UNIT
    assert extents.acquire(2 * UNIT) == 5 * UNIT
    assert extents.acquire(UNIT) is None
    extents.close_move()
    assert extents.acquire(2 * UNIT) == 3 * UNIT
    extents.check_invariants()


def test_an_extent_that_is_released_while_it_moves_frees_both_its_places() -> None:
    extents, begins = _filled([2, 3, 2])
    extents.release(begins[0])
    extents.release(begins[2])
    move = extents.open_move(4 * UNIT, ())
    assert move is not None
    extents.release(move.target)
    extents.check_invariants()
    assert extents.largest_hole == extents.num_bytes_free == 7 * UNIT
    with pytest.raises(AssertionError, match="no move is open"):
        extents.close_move()


def test_no_move_is_opened_where_a_hole_fits_already_or_never_will() -> None:
    extents, begins = _filled([2, 3, 2])
    extents.release(begins[0])
    assert extents.open_move(2 * UNIT, ()) is None
    assert extents.open_move(3 * UNIT, ()) is None


def test_bytes_behind_the_last_unit_are_left_alone() -> None:
    extents = Extents(3 * UNIT + 1)
    assert extents.num_bytes == 3 * UNIT and extents.acquire(3 * UNIT) == 0
    assert Extents(UNIT - 1).acquire(1) is None
    assert (round_up(0), round_up(1), round_up(UNIT), round_up(UNIT + 1)) == (UNIT, UNIT, UNIT, 2 * UNIT)


def test_releasing_an_extent_twice_is_refused() -> None:
    extents, begins = _filled([1, 1])
    extents.release(begins[0])
    with pytest.raises(KeyError):
        extents.release(begins[0])

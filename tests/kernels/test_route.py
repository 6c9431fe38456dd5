"""The grouping of rows: every adapter row in exactly one range, whatever the mix."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_kernels.profile import Profile, SiteProfile
from adapter_kernels.route import Group, Placement, build_route
from adapter_kernels.slab import Slab
from tests.kernels.random_adapters import SHAPES

SLABS = [Slab(Profile((SiteProfile(0, "q_proj", (rank,)),)), SHAPES, torch.float32) for rank in (2, 3)]


def covered_rows(group: Group) -> list[tuple[int, int]]:
    """(row, position) pairs that a group computes, paddings left out."""
    width = group.rows_per_position
    if group.kept is None:
        return [(row, group.first + (row - group.begin) // width) for row in range(group.begin, group.end)]
    assert group.padded is not None
    targets = group.kept.tolist()
    assert [int(group.padded[target]) for target in targets] == list(range(group.end - group.begin))
    return [(group.begin + i, group.first + target // width) for i, target in enumerate(targets)]


@given(st.lists(st.tuples(st.one_of(st.none(), st.tuples(st.integers(0, 1), st.integers(0, 15))), st.integers(1, 20))))
def test_every_row_with_an_adapter_is_covered_exactly_once(
    sequences: list[tuple[tuple[int, int] | None, int]],
) -> None:
    ordered = sorted(sequences, key=lambda item: (-1, 0) if item[0] is None else item[0])
    placements = [None if key is None else Placement(key[0], SLABS[key[0]], key[1]) for key, _ in ordered]
    counts = [count for _, count in ordered]
    route = build_route(placements, counts)
    expected = {}
    row = 0
    for key, count in ordered:
        for _ in range(count):
            if key is not None:
                expected[row] = key
            row += 1
    found: dict[int, tuple[int, int]] = {}
    for group in route.groups:
        for index, position in covered_rows(group):
            assert index not in found
            found[index] = (SLABS.index(group.slab), position)
    assert found == expected


def test_an_even_group_needs_no_gather() -> None:
    placements: list[Placement | None] = [Placement(0, SLABS[0], position) for position in range(4)]
    (group,) = build_route(placements, [2, 2, 2, 2]).groups
    assert group.padded is None and (group.first, group.last, group.rows_per_position) == (0, 4, 2)


def test_a_step_without_adapters_has_an_empty_route() -> None:
    route = build_route([None, None], [3, 1])
    assert route.groups == ()

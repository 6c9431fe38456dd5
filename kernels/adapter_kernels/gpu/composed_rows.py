"""Composed rows of a step, spread out into pairs: one pair for each row and each adapter that acts on it.

Owns how pairs are ordered, cut into parts that the workspace holds, and grouped: for the shrink by adapter, for
`compose` by composition. The host does it, with numpy, since nothing of it depends on what the device computes; the
arrays travel with the step's other words. Invariants: all pairs of a row are in one part, in the order in which they
are summed, so a row is rounded once; a block's rows share one composition, weights included.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapter_kernels.gpu.route_forms import block_rows_for

Int32s = NDArray[np.int32]
# adapter slots with their weights, in the order in which they are summed
Weighted = tuple[tuple[int, float], ...]
# of a block of `PairArrays.blocks`
BLOCK_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class PairArrays:
    """One part's pairs on the host. Pairs of a group lie adapter after adapter, each with all rows of the group."""

    # [P]: the pair's row of the step and its adapter slot
    row_of: Int32s
    slots: Int32s
    # [P]
    weights: NDArray[np.float32]
    # [B, 4]: a block's first pair, its rows, pairs from one adapter to the next, adapters
    blocks: Int32s
    # by adapter, as `DeviceRoute`: [P], [C], [C], [C]; empty where a block is a pair
    perm: Int32s
    block_slot: Int32s
    block_start: Int32s
    block_len: Int32s


def spread(rows: Sequence[tuple[int, int, Weighted]], max_pairs: int) -> list[PairArrays]:
    """Spread composed rows out into pairs.

    Args:
        rows: (first row, number of rows, composition) of each sequence that has one.
        max_pairs: of a part; at least as many as a composition has adapters.
    """
    by_composition: dict[Weighted, list[Int32s]] = {}
    for begin, count, weighted in rows:
        by_composition.setdefault(weighted, []).append(np.arange(begin, begin + count, dtype=np.int32))
    groups = [(weighted, np.concatenate(ranges)) for weighted, ranges in by_composition.items()]
    return [_arrays(part) for part in _parts(groups, max_pairs)]


def _parts(groups: list[tuple[Weighted, Int32s]], max_pairs: int) -> Iterator[list[tuple[Weighted, Int32s]]]:
    part: list[tuple[Weighted, Int32s]] = []
    room = max_pairs
    for weighted, rows in groups:
        assert 0 < len(weighted) <= max_pairs, f"a composition of {len(weighted)} adapters in parts of {max_pairs}"
        rest = rows
        while len(rest):
            if room < len(weighted):
                yield part
                part, room = [], max_pairs
            own, rest = np.split(rest, [room // len(weighted)])
            part.append((weighted, own))
            room -= len(own) * len(weighted)
    if part:
        yield part


def _arrays(part: list[tuple[Weighted, Int32s]]) -> PairArrays:
    sizes = [len(weighted) * len(rows) for weighted, rows in part]
    begins = np.cumsum(sizes) - sizes
    block_rows = block_rows_for(sum(sizes))
    blocks = [
        (begin + done, min(block_rows, len(rows) - done), len(rows), len(weighted))
        for begin, (weighted, rows) in zip(begins.tolist(), part, strict=True)
        for done in range(0, len(rows), block_rows)
    ]
    slots = np.concatenate([np.repeat([slot for slot, _ in weighted], len(rows)) for weighted, rows in part])
    weights = np.concatenate([np.repeat([weight for _, weight in weighted], len(rows)) for weighted, rows in part])
    row_of = np.concatenate([np.tile(rows, len(weighted)) for weighted, rows in part])
    perm, by_slot = _by_slot(slots, block_rows)
    return PairArrays(
        row_of=row_of.astype(np.int32),
        slots=slots.astype(np.int32),
        weights=weights.astype(np.float32),
        blocks=np.asarray(blocks, dtype=np.int32),
        perm=perm,
        block_slot=by_slot[0],
        block_start=by_slot[1],
        block_len=by_slot[2],
    )


def _by_slot(slots: NDArray[np.int64], block_rows: int) -> tuple[Int32s, Int32s]:
    """Group pairs by adapter: (order of the pairs [P], their blocks [3, C]: slot, start, length)."""
    if block_rows == 1:
        return np.zeros(0, dtype=np.int32), np.zeros((3, 0), dtype=np.int32)
    perm = np.argsort(slots, kind="stable")
    distinct, counts = np.unique(slots, return_counts=True)
    ends = np.cumsum(counts)
    blocks = [
        (slot, done, min(block_rows, end - done))
        for slot, count, end in zip(distinct.tolist(), counts.tolist(), ends.tolist(), strict=True)
        for done in range(end - count, end, block_rows)
    ]
    return perm.astype(np.int32), np.ascontiguousarray(np.asarray(blocks, dtype=np.int32).T)

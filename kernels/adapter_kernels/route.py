"""The grouping of a step's rows by adapter: built once per step, reused at every site.

Rows of one adapter lie side by side (the batch orders sequences by placement), so a route is a list of row ranges.
Long ranges (prefill chunks) become segments, one GEMM each; short ones (decodes) of neighbouring slab positions
become groups, one batched GEMM for all of them. Invariant: every row with an adapter is in exactly one range, rows
without adapter in none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.slab import Slab

# up to this many rows a padded batched GEMM beats one GEMM per adapter, whose 264 calls of 38 us cost 10 ms more:
# 32 rows over 8 adapters, the busiest with 10: 25 ms against 42 (2 cores, bf16, 2026-11)
MAX_GROUPED_ROWS = 16
# reading an idle neighbour's bytes is cheaper than a second round of calls up to about this size
# (17 GB/s against 264 calls of 20 us for 24 layers; 2-core EPYC with AVX-512, 2026-11)
_MAX_GAP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter lies: a position of a slab. `slab_id` orders slabs."""

    slab_id: int
    slab: Slab
    position: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `begin .. end` of the step, all of one adapter."""

    begin: int
    end: int
    slab: Slab
    position: int


@dataclass(frozen=True, slots=True)
class Group:
    """Rows `begin .. end` of the step, of the adapters at positions `first .. last` of a slab.

    `padded` [positions * rows_per_position] indexes the group's own rows, so that each position has as many; `kept`
    [end - begin] finds the real ones again. Both are None when every position has exactly `rows_per_position` rows.
    """

    begin: int
    end: int
    slab: Slab
    first: int
    last: int
    rows_per_position: int
    padded: Tensor | None
    kept: Tensor | None


@dataclass(frozen=True, slots=True)
class Route:
    """One step's row ranges by adapter."""

    segments: tuple[Segment, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    begin: int
    count: int
    placement: Placement


def build_route(placements: list[Placement | None], counts: list[int]) -> Route:
    """Group a step's rows.

    Args:
        placements: per sequence in row order, its adapter's placement, or None. Sequences of one adapter are
            neighbours. Best ordered by: many rows (more than `MAX_GROUPED_ROWS`) or few, then (slab_id, position).
        counts: per sequence, its number of rows, each >= 1.
    """
    segments: list[Segment] = []
    groups: list[Group] = []
    pending: list[_Run] = []
    for run in _runs(placements, counts):
        if run.count > MAX_GROUPED_ROWS:
            segments.append(Segment(run.begin, run.begin + run.count, run.placement.slab, run.placement.position))
            continue
        if pending and not _joins(pending[-1], run):
            groups.append(_group(pending))
            pending = []
        pending.append(run)
    if pending:
        groups.append(_group(pending))
    return Route(tuple(segments), tuple(groups))


def _runs(placements: list[Placement | None], counts: list[int]) -> list[_Run]:
    runs: list[_Run] = []
    begin = 0
    for placement, count in zip(placements, counts, strict=True):
        if placement is not None:
            last = runs[-1] if runs else None
            if last is not None and last.placement == placement and last.begin + last.count == begin:
                runs[-1] = _Run(last.begin, last.count + count, placement)
            else:
                runs.append(_Run(begin, count, placement))
        begin += count
    return runs


def _joins(left: _Run, right: _Run) -> bool:
    if left.placement.slab_id != right.placement.slab_id or left.begin + left.count != right.begin:
        return False
    gap = right.placement.position - left.placement.position - 1
    return gap >= 0 and gap * left.placement.slab.bytes_per_position <= _MAX_GAP_BYTES


def _group(runs: list[_Run]) -> Group:
    begin, end = runs[0].begin, runs[-1].begin + runs[-1].count
    first, last = runs[0].placement.position, runs[-1].placement.position + 1
    width = max(run.count for run in runs)
    slab = runs[0].placement.slab
    if len(runs) == last - first and all(run.count == width for run in runs):
        return Group(begin, end, slab, first, last, width, None, None)
    # a padding row repeats the group's first row; its result is dropped
    padded = torch.zeros((last - first) * width, dtype=torch.int64)
    kept = torch.empty(end - begin, dtype=torch.int64)
    for run in runs:
        target = (run.placement.position - first) * width
        source = run.begin - begin
        padded[target : target + run.count] = torch.arange(source, source + run.count)
        kept[source : source + run.count] = torch.arange(target, target + run.count)
    return Group(begin, end, slab, first, last, width, padded, kept)

"""The grouping of a step's rows by adapter: built once per step, reused at every site.

Rows of one adapter lie side by side (the batch orders sequences by placement), so a route is a list of row ranges,
the groups. A long range (a prefill chunk) is a group of one adapter; short ones (decodes) of neighbouring slab
positions become one group, one batched GEMM for all of them. Invariant: every row with an adapter is in exactly one
group, rows without adapter in none.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_kernels.extras import AdapterExtras
from adapter_kernels.slab import Slab

# up to this many rows a padded batched GEMM beats one group per adapter, whose 264 calls of 38 us cost 10 ms more:
# 32 rows over 8 adapters, the busiest with 10: 25 ms against 42 (2 cores, bf16, 2026-11)
MAX_GROUPED_ROWS = 16
# reading an idle neighbour's bytes is cheaper than a second round of calls up to about this size
# (17 GB/s against 264 calls of 20 us for 24 layers; 2-core EPYC with AVX-512, 2026-11)
_MAX_GAP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an adapter lies: a position of a slab, and what no slab packs. `slab_id` orders slabs."""

    slab_id: int
    slab: Slab
    position: int
    # a place is a position of a slab; whoever lies there brings its own
    extras: AdapterExtras | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Bags:
    """The rank rows of each row of a group, bag by bag, in a slab's [capacity * rank, O] flattened.

    `rank_rows` [rows * rank] int32; row i's are those from `begins[i]` on, [rows] int32.
    """

    rank_rows: Tensor
    begins: Tensor


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
    padded: Tensor | None = None
    kept: Tensor | None = None
    # by rank, each built when a site first asks: 168 members of 24 layers share a few
    _bags: dict[int, Bags] = field(default_factory=dict, compare=False, repr=False)

    def own(self, rows: Tensor) -> Tensor:
        """Cut the group's rows out of the step's: a view."""
        return rows[self.begin : self.end]

    def weights(self, packed: Tensor) -> Tensor:
        """Cut the group's adapters out of a slab's tensor [capacity, ..]: a view [positions, ..]."""
        return packed[self.first : self.last]

    def blocks(self, own: Tensor) -> Tensor:
        """Give each position its rows: [end - begin, W] to [positions, rows_per_position, W], padding repeated."""
        if self.padded is not None:
            own = own.index_select(0, self.padded)
        return own.view(self.last - self.first, self.rows_per_position, -1)

    def rows(self, blocks: Tensor) -> Tensor:
        """Undo `blocks`, padding dropped: [positions, rows_per_position, W] to [end - begin, W]."""
        flat = blocks.flatten(0, 1)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def per_row(self, packed: Tensor) -> Tensor:
        """Give each row its adapter's vector of a slab's tensor [capacity, W]: [end - begin, W] or a view [1, W]."""
        vectors = self.weights(packed)
        if vectors.shape[0] == 1:
            return vectors
        return vectors.index_select(0, self.position_of_rows())

    def bags(self, rank: int) -> Bags:
        """Tell which of a slab's rank rows [capacity * rank, O] are each row's own."""
        found = self._bags.get(rank)
        if found is None:
            firsts = (self.position_of_rows() + self.first) * rank
            rank_rows = (firsts[:, None] + torch.arange(rank)).flatten().to(torch.int32)
            begins = torch.arange(0, rank_rows.numel(), rank, dtype=torch.int32)
            found = self._bags[rank] = Bags(rank_rows, begins)
        return found

    def position_of_rows(self) -> Tensor:
        """Tell each row's position, counted from `first`: [end - begin] int64."""
        places = torch.arange(self.end - self.begin) if self.kept is None else self.kept
        return places // self.rows_per_position


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows `begin .. begin + count` of one adapter."""

    begin: int
    count: int
    placement: Placement

    def own(self, rows: Tensor) -> Tensor:
        """Cut the run's rows out of the step's: a view."""
        return rows[self.begin : self.begin + self.count]


@dataclass(frozen=True, slots=True)
class Route:
    """One step's row ranges by adapter: `groups` share calls, `runs` are each one adapter's alone, in row order."""

    groups: tuple[Group, ...]
    runs: tuple[Run, ...] = ()


def build_route(placements: list[Placement | None], counts: list[int]) -> Route:
    """Group a step's rows.

    Args:
        placements: per sequence in row order, its adapter's placement, or None. Sequences of one adapter are
            neighbours. Best ordered by: many rows (more than `MAX_GROUPED_ROWS`) or few, then (slab_id, position).
        counts: per sequence, its number of rows, each >= 1.
    """
    groups: list[Group] = []
    pending: list[Run] = []
    runs = _runs(placements, counts)
    for run in runs:
        if run.count > MAX_GROUPED_ROWS:
            groups.append(_group([run]))
            continue
        if pending and not _joins(pending[-1], run):
            groups.append(_group(pending))
            pending = []
        pending.append(run)
    if pending:
        groups.append(_group(pending))
    return Route(tuple(groups), tuple(runs))


def _runs(placements: list[Placement | None], counts: list[int]) -> list[Run]:
    runs: list[Run] = []
    begin = 0
    for placement, count in zip(placements, counts, strict=True):
        if placement is not None:
            last = runs[-1] if runs else None
            if last is not None and last.placement == placement and last.begin + last.count == begin:
                runs[-1] = Run(last.begin, last.count + count, placement)
            else:
                runs.append(Run(begin, count, placement))
        begin += count
    return runs


def _joins(left: Run, right: Run) -> bool:
    if left.placement.slab_id != right.placement.slab_id or left.begin + left.count != right.begin:
        return False
    gap = right.placement.position - left.placement.position - 1
    return gap >= 0 and gap * left.placement.slab.bytes_per_position <= _MAX_GAP_BYTES


def _group(runs: list[Run]) -> Group:
    begin, end = runs[0].begin, runs[-1].begin + runs[-1].count
    first, last = runs[0].placement.position, runs[-1].placement.position + 1
    width = max(run.count for run in runs)
    slab = runs[0].placement.slab
    if len(runs) == last - first and all(run.count == width for run in runs):
        return Group(begin, end, slab, first, last, width)
    # a padding row repeats the group's first row; its result is dropped
    padded = torch.zeros((last - first) * width, dtype=torch.int64)
    kept = torch.empty(end - begin, dtype=torch.int64)
    for run in runs:
        target = (run.placement.position - first) * width
        source = run.begin - begin
        padded[target : target + run.count] = torch.arange(source, source + run.count)
        kept[source : source + run.count] = torch.arange(target, target + run.count)
    return Group(begin, end, slab, first, last, width, padded, kept)

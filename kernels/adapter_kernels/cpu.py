"""The adapter ops as batched torch for CPU serving: one shrink and one expand per group of adapters, never per request.

Formula, for token t of adapter a at a fused site: c = x[t] @ A_a.T ; y[t, member] += c[member] @ BT_a + bias_a, the
same as `reference.fused_delta`. Products accumulate in fp32; the bridge c is rounded to the model's dtype. Rows
without adapter are never read or written; each row meets its own adapter's weights only.
"""

import torch
from torch import Tensor

from adapter_kernels.route import Group, Route, Segment
from adapter_kernels.slab import FusedRows


class CpuDelta:
    """One step's `AdapterDelta` on the CPU."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def add(self, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        """Add every row's delta into `y` in place; see `adapter_kernels.delta.AdapterDelta`."""
        for segment in self.route.segments:
            rows = segment.slab.fused.get((layer, site))
            if rows is not None:
                _add_segment(segment, rows, x, y)
        for group in self.route.groups:
            rows = group.slab.fused.get((layer, site))
            if rows is not None:
                _add_group(group, rows, x, y)


def _add_segment(segment: Segment, rows: FusedRows, x: Tensor, y: Tensor) -> None:
    own = y[segment.begin : segment.end]
    position = segment.position
    bridge = None if rows.a is None else torch.mm(x[segment.begin : segment.end], rows.a[position].T)
    for member in rows.members:
        columns = own[:, member.out_begin : member.out_end]
        if member.bt is not None and bridge is not None:
            columns.addmm_(bridge[:, member.rank_begin : member.rank_end], member.bt[position])
        if member.bias is not None:
            columns.add_(member.bias[position])


def _add_group(group: Group, rows: FusedRows, x: Tensor, y: Tensor) -> None:
    own_x, own_y = x[group.begin : group.end], y[group.begin : group.end]
    if group.padded is not None:
        own_x = own_x.index_select(0, group.padded)
    shape = (group.last - group.first, group.rows_per_position)
    bridge = None
    if rows.a is not None:
        bridge = torch.bmm(own_x.view(*shape, -1), rows.a[group.first : group.last].transpose(1, 2))
    for member in rows.members:
        columns = own_y[:, member.out_begin : member.out_end]
        weights = None if member.bt is None else member.bt[group.first : group.last]
        bias = None if member.bias is None else member.bias[group.first : group.last, None]
        coefficients = None if bridge is None else bridge[:, :, member.rank_begin : member.rank_end]
        if group.kept is None:
            _add_exact(columns.view(*shape, -1), coefficients, weights, bias)
        else:
            _add_padded(columns, coefficients, weights, bias, group)


def _add_exact(columns: Tensor, coefficients: Tensor | None, weights: Tensor | None, bias: Tensor | None) -> None:
    if coefficients is not None and weights is not None:
        columns.baddbmm_(coefficients, weights)
    if bias is not None:
        columns.add_(bias)


def _add_padded(
    columns: Tensor, coefficients: Tensor | None, weights: Tensor | None, bias: Tensor | None, group: Group
) -> None:
    kept = group.kept
    assert kept is not None, "a padded group knows its kept rows"
    if coefficients is not None and weights is not None:
        columns.add_(torch.bmm(coefficients, weights).flatten(0, 1).index_select(0, kept))
    if bias is not None:
        columns.add_(bias.expand(-1, group.rows_per_position, -1).flatten(0, 1).index_select(0, kept))

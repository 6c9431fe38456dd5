"""The adapter ops for CPU serving: one call per site where a low rank is all, else one per group, never per request.

Formula: `reference.site_output`, for token t of adapter a at each member of a fused site. Products accumulate in fp32;
the bridge is rounded to the model's dtype, and so is y after each op that an adapter has. A gate's logits are fp32.
Rows without adapter are never read or written; each row meets its own adapter's weights only.
"""

import torch
from torch import Tensor

from adapter_kernels.delta import BaseLinear, ModelDelta
from adapter_kernels.gate import Choice, add_chosen, choose, normalised, weigh
from adapter_kernels.native_cpu import CpuKernels
from adapter_kernels.native_layouts import RunTable
from adapter_kernels.rare_ops import acting_at, add_rare, apply_frames, framed_input, rare_runs
from adapter_kernels.route import MAX_GROUPED_ROWS, Group, Route, Run
from adapter_kernels.scales import scaled_product
from adapter_kernels.slab import FusedRows, Member, Slab


class CpuDelta:
    """One step's `AdapterDelta` on the CPU."""

    def __init__(self, route: Route, model: ModelDelta | None = None, kernels: CpuKernels | None = None) -> None:
        """Take a step's route.

        Args:
            model: what acts outside the linear sites. kernels: the compiled ones, for sites they can read; None: torch.
        """
        self.route = route
        self.model = model
        self._kernels = kernels
        self._run_tables = [] if kernels is None else _run_tables(route)
        self._has_scales = any(group.slab.has_scales for group in route.groups)
        self._rare_runs = rare_runs(route)

    def apply(self, layer: int, site: str, x: Tensor, base: BaseLinear) -> Tensor:
        """Run a fused site with every row's adapter; see `adapter_kernels.delta.AdapterDelta`."""
        acting = [
            (group, rows) for group in self.route.groups if (rows := group.slab.fused.get((layer, site))) is not None
        ]
        rare = acting_at(self._rare_runs, layer, site)
        seen = framed_input(site, rare, x) if rare else x
        y = scaled_product(site, acting, seen, base) if self._has_scales else base(seen)
        if rare:
            apply_frames(site, rare, x, y, base)
        if self._kernels is not None:
            acting = [(group, rows) for group, rows in acting if rows.low_rank is None]
            self._add_low_rank(self._kernels, layer, site, x, y)
        for group, rows in acting:
            add = _add_plain if rows.is_plain else _add
            add(group, rows, group.own(x), group.own(y))
        if rare:
            add_rare(rare, x, y)
        return y

    def _add_low_rank(self, kernels: CpuKernels, layer: int, site: str, x: Tensor, y: Tensor) -> None:
        # the kernel takes rows that are a stride apart, not values that are
        x = x if x.stride(1) == 1 else x.contiguous()
        for slab, table in self._run_tables:
            rows = slab.fused.get((layer, site))
            if rows is not None and rows.low_rank is not None:
                kernels.add_low_rank(rows.low_rank, table, x, y)


def _run_tables(route: Route) -> list[tuple[Slab, RunTable]]:
    runs: dict[int, list[Run]] = {}
    for run in route.runs:
        runs.setdefault(run.placement.slab_id, []).append(run)
    return [
        (own[0].placement.slab, RunTable([(run.begin, run.count, run.placement.position) for run in own]))
        for own in runs.values()
    ]


def _add_plain(group: Group, rows: FusedRows, x: Tensor, y: Tensor) -> None:
    """As `_add` where there are rank rows and nothing else, which is most of what is served, in as few calls."""
    assert rows.a is not None, "a plain site has rank rows"
    first = group.first
    if group.rows_per_position > MAX_GROUPED_ROWS:
        assert group.last - first == 1, "a long run is a group of its own"
        bridge = torch.mm(x, rows.a[first].t())
        for m in rows.members:
            assert m.bt is not None, "a plain site has rank rows"
            y[:, m.out_begin : m.out_end].addmm_(bridge[:, m.rank_begin : m.rank_end], m.bt[first])
        return
    bridge = group.rows(_product(group.blocks(x), group.weights(rows.a).transpose(1, 2)))
    for m in rows.members:
        assert m.bt is not None, "a plain site has rank rows"
        _add_bags(y[:, m.out_begin : m.out_end], bridge[:, m.rank_begin : m.rank_end], m.bt, group)


def _add(group: Group, rows: FusedRows, x: Tensor, y: Tensor) -> None:
    """Add a group's deltas; x [n, D] and y [n, O] are its own rows."""
    blocks = group.blocks(x)  # [positions, rows, D]
    logits = _logits(group, rows, blocks)
    is_gathered = rows.is_mixture and _reads_less(group, rows)
    bridge = None
    if rows.a is not None and not is_gathered:
        bridge = _product(blocks, group.weights(rows.a).transpose(1, 2))
    for member in rows.members:
        columns = y[:, member.out_begin : member.out_end]
        choice = None
        if member.mixture is not None:
            own = logits[member.mixture.options.in_norm][:, :, member.mixture.begin : member.mixture.end]
            bias = None if member.gate_bias is None else group.weights(member.gate_bias)[:, None]
            choice = choose(own, member.mixture, bias)
        if bridge is not None:
            _add_bridge(columns, bridge, choice, member, group)
        elif choice is not None:
            _add_chosen(x, columns, rows, choice, member, group)
        if member.cols_idx is not None and member.cols_d is not None:
            idx = group.weights(member.cols_idx)[:, None].expand(-1, blocks.shape[1], -1)
            _expand(columns, torch.gather(blocks, 2, idx), group.weights(member.cols_d), group)
        if member.bias is not None:
            columns.add_(group.per_row(member.bias))


def _logits(group: Group, rows: FusedRows, blocks: Tensor) -> dict[str, Tensor]:
    """Run the gates on the rows as each norm that any of them asks for shows them: [positions, rows, E] fp32."""
    if rows.gates is None:
        return {}
    gates = group.weights(rows.gates).transpose(1, 2)
    return {norm: torch.bmm(normalised(blocks.float(), norm), gates) for norm in rows.in_norms}


def _reads_less(group: Group, rows: FusedRows) -> bool:
    """Would fetching each row's chosen experts read fewer rows than all experts have?

    One fetched row costs about as much as one of a whole product: E=28, r=8, top 2, 896 to 4864, bf16: 8 rows 383 us
    fetched, 585 whole; 4 rows 242 and 905 (2 cores of an EPYC under load, 2026-11).
    """
    num_rows = group.end - group.begin
    mixtures = [member.mixture for member in rows.members if member.mixture is not None]
    fetched = sum(num_rows * mixture.top_k * mixture.ranks_of_expert.shape[1] for mixture in mixtures)
    return fetched < (group.last - group.first) * sum(mixture.expert_of_rank.numel() for mixture in mixtures)


def _add_bridge(columns: Tensor, bridge: Tensor, choice: Choice | None, member: Member, group: Group) -> None:
    if member.bt is not None:
        coefficients = bridge[:, :, member.rank_begin : member.rank_end]
        if choice is not None and member.mixture is not None:
            _expand(columns, weigh(coefficients, choice, member.mixture), group.weights(member.bt), group)
        elif group.rows_per_position > MAX_GROUPED_ROWS:
            _expand(columns, coefficients, group.weights(member.bt), group)
        else:
            _add_bags(columns, group.rows(coefficients), member.bt, group)
    if member.rows_idx is not None:
        values = group.rows(bridge[:, :, member.rank_end : member.rows_end])
        columns.scatter_add_(1, group.per_row(member.rows_idx).expand(values.shape), values)


def _product(blocks: Tensor, weights: Tensor) -> Tensor:
    """Multiply [positions, n, K] by [positions, K, W]; one position as a plain product: 39 us for 118 at n = 17."""
    return torch.mm(blocks[0], weights[0])[None] if blocks.shape[0] == 1 else torch.bmm(blocks, weights)


def _expand(columns: Tensor, coefficients: Tensor, weights: Tensor, group: Group) -> None:
    """Add coefficients [positions, rows, R] times weights [positions, R, O] into the group's columns [n, O]."""
    if group.kept is None and coefficients.shape[0] == 1:
        columns.addmm_(coefficients[0], weights[0])
    elif group.kept is None:
        columns.view(*coefficients.shape[:2], -1).baddbmm_(coefficients, weights)
    else:
        columns.add_(group.rows(torch.bmm(coefficients, weights)))


def _add_bags(columns: Tensor, coefficients: Tensor, bt: Tensor, group: Group) -> None:
    """Add to each row, by its coefficients [n, R], its own few rank rows of bt [capacity, R, O].

    A row reads its rank rows and nothing else: no padding, no product made anew for each number of rows, and the same
    bits whatever is beside it.
    """
    _, rank, width = bt.shape
    bags = group.bags(rank)
    weights = coefficients.reshape(-1)
    delta = torch.embedding_bag(bt.view(-1, width), bags.rank_rows, bags.begins, False, 0, False, weights)[0]
    columns.add_(delta)


def _add_chosen(x: Tensor, columns: Tensor, rows: FusedRows, choice: Choice, member: Member, group: Group) -> None:
    assert rows.a is not None and member.bt is not None and member.mixture is not None, "a mixture has rank rows"
    position = group.position_of_rows() + group.first
    own = Choice(group.rows(choice.experts), group.rows(choice.weights))
    first_a = position * rows.a.shape[1] + member.rank_begin
    first_bt = position * member.bt.shape[1]
    add_chosen(x, rows.a.flatten(0, 1), member.bt.flatten(0, 1), first_a, first_bt, own, member.mixture, columns)

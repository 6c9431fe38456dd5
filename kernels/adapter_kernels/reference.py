"""Every adapter op in plain fp32 torch: the definition that the fast paths are tested against.

One token at a time, no grouping, no layout tricks. Invariant: a token's result depends on its own row and its own
adapter only (select, never multiply by a mask).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.extras import RareSite
from adapter_kernels.gpu.tables import DeviceTables
from adapter_kernels.image import AdapterImage, Gate, SiteTensors, Sparse
from adapter_kernels.rare_image import read_rare
from adapter_kernels.reference_rare import rare_delta, turned_inputs, turned_outputs


def shrink(x: Tensor, a: Tensor) -> Tensor:
    """Project rows down to the adapter's rank: c[t, j] = A[j] . x[t], in fp32.

    Args:
        x: [T, D]. a: [R, D].
    Returns:
        [T, R] fp32.
    """
    return x.float() @ a.float().T


def expand(c: Tensor, bt: Tensor) -> Tensor:
    """Weigh the rank rows: y[t] = sum_j c[t, j] * R[j, :], in fp32.

    Args:
        c: [T, R] fp32. bt: [R, O] rank rows, the scaling folded in.
    Returns:
        [T, O] fp32.
    """
    return c @ bt.float()


def gate_weights(x: Tensor, gate: Gate) -> list[tuple[int, float]]:
    """Choose one token's experts: the `top_k` largest of g = x' G.T + bias, or of |g|, ties to the lower expert.

    x' is x, (x - mean) / sqrt(variance + 1e-5), or x / max(|x|, 1e-12). The weights of the chosen: softmax over the
    chosen g / temperature (one expert alone weighs 1); softmax over all, and then by their sum; softmax over all; 1;
    1 / (1 + exp(-g / temperature)).

    Args:
        x: [D].
    Returns:
        (expert, weight), the largest logit first.
    """
    logits = _gate_input(x.float(), gate.options.in_norm) @ gate.weight.float().T
    logits = logits if gate.bias is None else logits + gate.bias
    logits = logits.abs() if gate.options.logit == "abs" else logits
    # a row whose logits are not numbers chooses somebody: it is lost, its neighbours are not
    order = sorted(range(len(gate.ranks)), key=lambda expert: (-float(logits[expert].nan_to_num()), expert))
    chosen = order[: gate.top_k]
    weights = _gate_weights(logits / gate.temperature, chosen, gate.options.weight)
    return [(expert, float(weight)) for expert, weight in zip(chosen, weights, strict=True)]


def _gate_input(x: Tensor, in_norm: str) -> Tensor:
    if in_norm == "layernorm_noaffine":
        return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    return x / max(float(x.square().sum().sqrt()), 1e-12) if in_norm == "unit" else x


def _gate_weights(logits: Tensor, chosen: list[int], kind: str) -> Tensor:
    if kind == "one" or (kind == "softmax_selected" and len(chosen) == 1):
        return torch.ones(len(chosen))
    if kind == "sigmoid":
        return 1 / (1 + torch.exp(-logits[chosen]))
    shares = torch.softmax(logits[chosen] if kind == "softmax_selected" else logits, 0)
    if kind == "softmax_all_renorm":
        return shares[chosen] / shares[chosen].sum()
    return shares if kind == "softmax_selected" else shares[chosen]


def mixture(x: Tensor, site: SiteTensors, gate: Gate) -> Tensor:
    """Mix the experts of each token: y[t] = sum over its chosen e of w_e * expand(shrink(x[t], A_e), BT_e).

    In rank space: y[t] = sum over the chosen e of w_e * expand(z, BT_e), z = sum over them of w_e * shrink(x[t], A_e).

    Args:
        x: [T, D]. site: a and bt hold the experts' rows stacked, `gate.ranks` of each.
    Returns:
        [T, O] fp32.
    """
    ends = torch.tensor(gate.ranks).cumsum(0).tolist()
    out = torch.zeros(x.shape[0], site.bt.shape[1])
    for token in range(x.shape[0]):
        chosen = gate_weights(x[token], gate)
        owned = {expert: slice(ends[expert] - gate.ranks[expert], ends[expert]) for expert, _ in chosen}
        bridges = {expert: shrink(x[token : token + 1], site.a[own]) for expert, own in owned.items()}
        if gate.options.mix == "rank":
            mixed = sum((weight * bridges[expert] for expert, weight in chosen), torch.zeros(1, gate.ranks[0]))
            bridges = dict.fromkeys(owned, mixed)
        for expert, weight in chosen:
            out[token] += weight * expand(bridges[expert], site.bt[owned[expert]])[0]
    return out


def gather_expand(x: Tensor, cols: Sparse) -> Tensor:
    """Change columns of W: y[t] = sum_j x[t, idx[j]] * D[j, :], D [s, out]; [T, O] fp32."""
    return expand(x[:, cols.idx.long()].float(), cols.d)


def shrink_scatter(x: Tensor, rows: Sparse, out_dim: int) -> Tensor:
    """Change rows of W: y[t, idx[j]] = D[j] . x[t], D [s, in], and zero elsewhere; [T, O] fp32."""
    out = torch.zeros(x.shape[0], out_dim)
    out[:, rows.idx.long()] = shrink(x, rows.d)
    return out


def site_delta(x: Tensor, site: SiteTensors) -> Tensor:
    """Delta of one adapter at one site, the sum of its additive ops: [T, O] fp32.

    expand(shrink(x, A), BT), or with a gate its mixture, + gather_expand + shrink_scatter + bias.
    """
    delta = expand(shrink(x, site.a), site.bt) if site.gate is None else mixture(x, site, site.gate)
    if site.cols is not None:
        delta = delta + gather_expand(x, site.cols)
    if site.rows is not None:
        delta = delta + shrink_scatter(x, site.rows, site.bt.shape[1])
    return delta if site.bias is None else delta + site.bias.float()


def site_output(
    x: Tensor, weight: Tensor, bias: Tensor | None, site: SiteTensors, rare: RareSite | None = None
) -> Tensor:
    """One adapter's whole site: y = turn(out_scale * (W turn(in_scale * x))) + b + site_delta(x) + rare_delta(x).

    Args:
        x: [T, D]. weight: [O, D] and bias: [O] of the base. rare: its frame turns, its scales are those of `site`.
    Returns:
        [T, O] fp32.
    """
    frame = None if rare is None else rare.frame
    scaled = x.float() if site.in_scale is None else x.float() * site.in_scale.float()
    if frame is not None and frame.blockdiag is not None:
        scaled = turned_inputs(scaled, frame.blockdiag)
    y = scaled @ weight.float().T
    if site.out_scale is not None:
        y = y * site.out_scale.float()
    if frame is not None and frame.rotation is not None:
        y = turned_outputs(y, frame.rotation)
    y = (y if bias is None else y + bias.float()) + site_delta(x, site)
    return y if rare is None else y + rare_delta(x, rare)


def fused_output(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: int, fused_site: str, adapters: Sequence[AdapterImage | None]
) -> Tensor:
    """Output of a whole step at a fused site, token by token: `site_output` of each member by the token's adapter.

    Args:
        x: [T, D]. weight: [O_fused, D] and bias: [O_fused], the members' one below the other. adapters: T entries.
    Returns:
        [T, O_fused] fp32; the base's own product where the adapter does not act or the token has none.
    """
    base_bias = torch.zeros(weight.shape[0]) if bias is None else bias.float()
    out = x.float() @ weight.float().T + base_bias
    for token, adapter in enumerate(adapters):
        if adapter is None:
            continue
        x_row, begin = x[token : token + 1], 0
        for site in FUSED_SITES[fused_site]:
            end = begin + adapter.shapes[site][0]
            own_weight, own_bias = weight[begin:end], base_bias[begin:end]
            for rows in adapter.rows:
                if (rows.layer, rows.site) == (layer, site):
                    rare = read_rare(adapter, rows, torch.float32)
                    out[token, begin:end] = site_output(x_row, own_weight, own_bias, adapter.site(rows), rare)[0]
            begin = end
    return out


def fused_delta(
    x: Tensor, layer: int, fused_site: str, adapters: Sequence[AdapterImage | None], shapes: dict[str, tuple[int, int]]
) -> Tensor:
    """Delta of a whole step at a fused site, token by token.

    out[t] = concat over the fused site's members of site_delta(x[t], adapter of t); zero where the adapter has no
    rows there or the token has no adapter.

    Args:
        x: [T, D]. adapters: T entries. shapes: (out, in) per base-neutral site.
    Returns:
        [T, O_fused] fp32.
    """
    members = FUSED_SITES[fused_site]
    out = torch.zeros(x.shape[0], sum(shapes[site][0] for site in members))
    for token, adapter in enumerate(adapters):
        if adapter is None:
            continue
        begin = 0
        for site in members:
            end = begin + shapes[site][0]
            for rows in adapter.rows:
                if rows.layer == layer and rows.site == site:
                    out[token, begin:end] = site_delta(x[token : token + 1], adapter.site(rows))[0]
            begin = end
    return out


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """Rows grouped by adapter and cut into blocks: the int32 tensors of a device route."""

    # [T]
    perm: Tensor
    # [C] each
    block_slot: Tensor
    block_start: Tensor
    block_len: Tensor


def group_rows(local: Tensor, slot_of: Tensor, block_rows: int, capacity: int) -> RowBlocks:
    """Sort rows stably by bucket and cut each bucket's rows into blocks; unused blocks have slot -2 and no rows.

    Args:
        local: [T] int32 bucket per row. slot_of: [num_buckets] int32 adapter slot per bucket, -1: none.
    """
    perm = torch.sort(local, stable=True).indices
    blocks = []
    begin = 0
    for bucket, slot in enumerate(slot_of.tolist()):
        end = begin + int((local == bucket).sum())
        blocks += [(slot, place, min(block_rows, end - place)) for place in range(begin, end, block_rows)]
        begin = end
    blocks += [(-2, 0, 0)] * (capacity - len(blocks))
    table = torch.tensor(blocks, dtype=torch.int32)
    return RowBlocks(perm.int(), table[:, 0].contiguous(), table[:, 1].contiguous(), table[:, 2].contiguous())


def table_site(tables: DeviceTables, site: int, slot: int, in_dim: int, out_dim: int) -> SiteTensors | None:
    """Read one adapter's tensors at one site out of the arena; None where it has neither rank nor bias there."""
    a, bt, bias, rank = tables.rows[site, slot, :4].tolist()
    if rank == 0 and bias < 0:
        return None
    return SiteTensors(
        a=tables.arena[a : a + rank * in_dim].view(rank, in_dim),
        bt=tables.arena[bt : bt + rank * out_dim].view(rank, out_dim),
        bias=tables.arena[bias : bias + out_dim] if bias >= 0 else None,
    )


def table_acts(tables: DeviceTables, first_site: int, num_members: int, slots: Tensor) -> Tensor:
    """Tell at which members of a fused site each row's adapter acts: [T, members] bool."""
    entries = tables.rows[first_site : first_site + num_members, slots.clamp(min=0).long()]
    return ((entries[..., 3] > 0) | (entries[..., 2] >= 0)).T & (slots >= 0)[:, None]


def table_bridge(
    x: Tensor, tables: DeviceTables, first_site: int, num_members: int, slots: Tensor
) -> list[list[Tensor]]:
    """Shrink each row with its own adapter: c[t][m] = A_m . x[t], [rank] fp32; no columns where nothing acts.

    Args:
        x: [T, D]. slots: [T] adapter slot per row, -1: none.
    """
    in_dim = x.shape[1]
    bridge = []
    for token, slot in enumerate(slots.tolist()):
        row = []
        for site in range(first_site, first_site + num_members):
            rows = table_site(tables, site, slot, in_dim, 0) if slot >= 0 else None
            row.append(torch.empty(0) if rows is None else shrink(x[token : token + 1], rows.a)[0])
        bridge.append(row)
    return bridge


def table_delta(x: Tensor, tables: DeviceTables, first_site: int, widths: tuple[int, ...], slots: Tensor) -> Tensor:
    """Delta of a step at a fused site, read from the device tables: [T, sum of widths] fp32.

    out[t, columns of m] = sum_j c[t, m, j] BT_m[j, :] + bias_m with c as `table_bridge`, rounded to the arena's dtype
    as every fast path rounds it; zero where the row's adapter does not act.
    """
    bridge = table_bridge(x, tables, first_site, len(widths), slots)
    out = torch.zeros(x.shape[0], sum(widths))
    for token, slot in enumerate(slots.tolist()):
        begin = 0
        for member, width in enumerate(widths):
            rows = table_site(tables, first_site + member, slot, x.shape[1], width) if slot >= 0 else None
            if rows is not None:
                c = bridge[token][member].to(tables.arena.dtype).float()
                out[token, begin : begin + width] = expand(c[None], rows.bt)[0]
                if rows.bias is not None:
                    out[token, begin : begin + width] += rows.bias.float()
            begin += width
    return out

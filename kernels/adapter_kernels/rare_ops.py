"""The ops that no slab packs, run per adapter over its own rows: sparse and dense changes, turned inputs and outputs.

Formulas: `reference_rare.py`. Products of sparse values and everything around the base's product are fp32, rounded to
the model's dtype once. Invariant: a row meets its own adapter's tensors only, and rows of other adapters are neither
read nor written.
"""

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES, BaseLinear
from adapter_kernels.extras import Frame, RareSite, Rotation, Sparse2d
from adapter_kernels.route import Route, Run

Acting = list[tuple[Run, RareSite]]


def rare_runs(route: Route) -> tuple[Run, ...]:
    """Return the runs whose adapter holds anything of this file; none of most steps."""
    extras = ((run, run.placement.extras) for run in route.runs)
    return tuple(run for run, own in extras if own is not None and own.sites)


def acting_at(runs: tuple[Run, ...], layer: int, fused_site: str) -> Acting:
    """Return what acts at a fused site, each member by itself."""
    found = []
    for run in runs:
        extras = run.placement.extras
        for site in FUSED_SITES[fused_site]:
            rare = None if extras is None else extras.sites.get((layer, site))
            if rare is not None:
                found.append((run, rare))
    return found


def framed_input(fused_site: str, acting: Acting, x: Tensor) -> Tensor:
    """Return x [T, D] with the inputs of framed rows changed, for a site that has the base's product to itself."""
    if len(FUSED_SITES[fused_site]) > 1:
        return x
    framed = None
    for run, rare in acting:
        if rare.frame is not None and rare.frame.changes_input:
            framed = x.clone() if framed is None else framed
            run.own(framed).copy_(_enter(run.own(x), rare.frame))
    return x if framed is None else framed


def apply_frames(fused_site: str, acting: Acting, x: Tensor, y: Tensor, base: BaseLinear) -> None:
    """Put the frames around the base's product y [T, O], in place.

    Where members share one product, one of them alone costs another, of its rows.
    """
    is_whole = len(FUSED_SITES[fused_site]) == 1
    for run, rare in acting:
        if rare.frame is None:
            continue
        own = slice(rare.out_begin, rare.out_end)
        columns = run.own(y)[:, own]
        if rare.frame.changes_input and not is_whole:
            columns.copy_(base(_enter(run.own(x), rare.frame))[:, own])
        if rare.frame.changes_output:
            _leave(columns, rare.frame, None if base.bias is None else base.bias[own])


def add_rare(acting: Acting, x: Tensor, y: Tensor) -> None:
    """Add sparse and dense changes of the original x [T, D] into y [T, O]."""
    for run, rare in acting:
        columns = run.own(y)[:, rare.out_begin : rare.out_end]
        if rare.csr is not None:
            columns.add_(sparse_product(run.own(x), rare.csr))
        if rare.dense is not None:
            columns.addmm_(run.own(x), rare.dense.T)


def sparse_product(x: Tensor, matrix: Sparse2d) -> Tensor:
    """Multiply rows x [n, in] by a sparse matrix [out, in]: [n, out] fp32.

    Each output is a weighted bag of inputs: 13x faster than scattering products, 8 % of 3584 x 896, 64 rows (2026-11).
    """
    inputs = x.float().T
    # a bag of single numbers takes another path, 3x slower and with other sums: 5 % of 4864 x 896, 3.1 ms for 0.9
    inputs = inputs.expand(-1, 2) if x.shape[0] == 1 else inputs
    product = torch.nn.functional.embedding_bag(
        matrix.col,
        inputs.contiguous(),
        matrix.indptr,
        mode="sum",
        per_sample_weights=matrix.val,
        include_last_offset=True,
    )
    return product[:, : x.shape[0]].T


def _enter(x: Tensor, frame: Frame) -> Tensor:
    """Scale inputs, then turn each block: x'[k] = x[k] @ blockdiag[k]."""
    rows = x.float() if frame.in_scale is None else x.float() * frame.in_scale
    if frame.blockdiag is not None:
        num_blocks, size, _ = frame.blockdiag.shape
        blocks = rows.view(-1, num_blocks, size).transpose(0, 1)
        rows = torch.bmm(blocks, frame.blockdiag).transpose(0, 1).reshape(rows.shape)
    return rows.to(x.dtype)


def _leave(columns: Tensor, frame: Frame, bias: Tensor | None) -> None:
    """Scale outputs, then turn each pair, without the base's bias, which the product already holds."""
    product = columns.float() if bias is None else columns.float() - bias.float()
    if frame.out_scale is not None:
        product = product * frame.out_scale
    if frame.rotation is not None:
        product = _turn(product, frame.rotation)
    columns.copy_(product if bias is None else product + bias.float())


def _turn(u: Tensor, rotation: Rotation) -> Tensor:
    first, second = u.view(u.shape[0], -1, 2, rotation.group // 2).unbind(2)
    partner = torch.stack((-second, first), dim=2).view(u.shape)
    return u * rotation.c0 + partner * rotation.c1

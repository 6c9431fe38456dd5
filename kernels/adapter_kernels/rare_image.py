"""A site's ops that no slab packs, read out of an adapter image in the form that `rare_ops.py` runs.

Owns the reading: signs become values, everything around the base's product fp32. The tensors are copies, so the
image's bytes need not stay. Invariant: a sparse matrix that is read names no input and no output that the site lacks.
"""

from dataclasses import replace

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.extras import Frame, GroupExperts, RareSite, Rotation, Sparse2d
from adapter_kernels.image import WAY_OUT, AdapterImage, CsrRows, ImageError, SiteRows


def read_rare_sites(image: AdapterImage, dtype: torch.dtype) -> dict[tuple[int, str], RareSite]:
    """Read every site that holds what slabs do not pack; `dtype` is what the model computes in.

    Raises:
        ImageError: an offset does not fit the image, or the table contradicts itself.
    """
    found = ((rows, read_rare(image, rows, dtype)) for rows in image.rows)
    return {(rows.layer, rows.site): rare for rows, rare in found if rare is not None}


def read_rare(image: AdapterImage, rows: SiteRows, dtype: torch.dtype) -> RareSite | None:
    """Read one site; None where a slab packs everything of it. Raises ImageError."""
    out_dim, in_dim = image.shapes[rows.site]
    rare = RareSite(
        csr=None if rows.csr is None else _sparse(image, rows.csr, out_dim, in_dim),
        dense=None
        if rows.dense_offset is None
        else image.view(rows.dense_offset, out_dim, in_dim).to(dtype, copy=True),
        frame=_frame(image, rows) if rows.has_frame else None,
        experts=_group_experts(image, rows, dtype) if rows.has_group_gate else None,
    )
    if rare == RareSite():
        return None
    begin = _first_output(image, rows.site)
    return replace(rare, out_begin=begin, out_end=begin + out_dim)


def _first_output(image: AdapterImage, site: str) -> int:
    members = next(members for members in FUSED_SITES.values() if site in members)
    return sum(image.shapes[member][0] for member in members[: members.index(site)])


def _sparse(image: AdapterImage, rows: CsrRows, out_dim: int, in_dim: int) -> Sparse2d:
    indptr = image.view(rows.indptr_offset, 1, out_dim + 1, torch.int32)[0].clone()
    col = image.view(rows.col_offset, 1, rows.nnz, torch.int32)[0].clone()
    starts = (int(indptr[0]), int(indptr[-1]))
    if starts != (0, rows.nnz) or not bool((indptr[1:] >= indptr[:-1]).all()):
        raise ImageError(f"the rows at byte {rows.indptr_offset} do not lead from 0 to {rows.nnz}; {WAY_OUT}")
    # a step must not meet an index that torch refuses: it would fail the other rows too
    if not bool(((col >= 0) & (col < in_dim)).all()):
        raise ImageError(f"columns at byte {rows.col_offset} are not below {in_dim}; {WAY_OUT}")
    if rows.scale_offset is None:
        return Sparse2d(indptr, col, image.view(rows.val_offset, 1, rows.nnz)[0].to(torch.float32, copy=True))
    packed = image.view(rows.val_offset, 1, -(-rows.nnz // 8), torch.uint8)[0]
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    is_negative = bits.flatten()[: rows.nnz].bool()
    scale = image.view(rows.scale_offset, 1, 1, torch.float32)[0, 0]
    return Sparse2d(indptr, col, torch.where(is_negative, -scale, scale))


def _frame(image: AdapterImage, rows: SiteRows) -> Frame:
    out_dim, in_dim = image.shapes[rows.site]
    size, blocks, rotation = rows.blockdiag, None, None
    if size:
        if rows.blockdiag_offset is None or in_dim % size:
            raise ImageError(f"layer {rows.layer}, {rows.site}: no blocks of {size} inputs; {WAY_OUT}")
        blocks = image.view(rows.blockdiag_offset, in_dim, size, torch.float32).clone().view(-1, size, size)
    if rows.rot2_group:
        c0 = _clone(image.vector(rows.c0_offset, out_dim, torch.float32))
        c1 = _clone(image.vector(rows.c1_offset, out_dim, torch.float32))
        if c0 is None or c1 is None or rows.rot2_group % 2 or out_dim % rows.rot2_group:
            raise ImageError(f"layer {rows.layer}, {rows.site}: no pairs in groups of {rows.rot2_group}; {WAY_OUT}")
        rotation = Rotation(rows.rot2_group, c0, c1)
    return Frame(
        in_scale=_clone(image.vector(rows.in_scale_offset, in_dim, torch.float32)),
        blockdiag=blocks,
        out_scale=_clone(image.vector(rows.out_scale_offset, out_dim, torch.float32)),
        rotation=rotation,
    )


def _group_experts(image: AdapterImage, rows: SiteRows, dtype: torch.dtype) -> GroupExperts:
    out_dim, in_dim = image.shapes[rows.site]
    a, bt = image.view(rows.a_offset, rows.rank, in_dim), image.view(rows.bt_offset, rows.rank, out_dim)
    return GroupExperts(rows.gate_options.group, rows.ranks, a.to(dtype, copy=True), bt.to(dtype, copy=True))


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()

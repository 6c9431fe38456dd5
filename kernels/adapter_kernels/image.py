"""Where each site's rows lie in an adapter image: the offset table that every kernel reads.

The image is the data section of the canonical adapter file, byte for byte: layer-major, site order q, k, v, o, gate,
up, down; per site, each where it exists: gate `[E, in]` and its bias `[E]`, `A [sum of ranks, in]`, rank rows
`BT [sum of ranks, out]`, cols `idx [s]` and `D [s, out]`, rows `idx [s]` and `D [s, in]`, a sparse matrix, a dense one,
`out_scale [out]`, `in_scale [in]`, blocks, `c0 [out]`, `c1 [out]`, `bias [out]`, each aligned to 128 bytes, at true
rank. Indices are int32, scales, blocks, rotations and gate biases float32 whatever the image's dtype. This module only
reads, `rare_image.py` what slabs do not pack; invariants: no view reaches outside the image, and no index names a
channel that the site lacks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gate_options import METEORA, GateOptions


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Byte offsets of `count` int32 indices and of as many rows."""

    count: int
    idx_offset: int
    d_offset: int


@dataclass(frozen=True, slots=True)
class CsrRows:
    """Byte offsets of indptr int32 [out + 1], col int32 [nnz] and val [nnz].

    Ternary, with a `scale_offset` (fp32 [1]): `val_offset` is that of packed signs uint8, lowest bit first, 1: minus.
    """

    nnz: int
    indptr_offset: int
    col_offset: int
    val_offset: int
    scale_offset: int | None = None


@dataclass(frozen=True, slots=True)
class SiteRows:
    """Byte offsets of one site's tensors inside the image; None where the adapter has no such tensor.

    `ranks`: none, one (plain low rank), or one per expert of a mixture; `top_k`, `temperature`, `gate_bias_offset` and
    `gate_options` belong to its gate. `blockdiag` and `rot2_group` are sizes, 0: none.
    """

    layer: int
    site: str
    ranks: tuple[int, ...]
    a_offset: int
    bt_offset: int
    bias_offset: int | None
    gate_offset: int | None = None
    top_k: int = 0
    temperature: float = 1.0
    cols: SparseRows | None = None
    rows: SparseRows | None = None
    out_scale_offset: int | None = None
    in_scale_offset: int | None = None
    gate_options: GateOptions = METEORA
    gate_bias_offset: int | None = None
    csr: CsrRows | None = None
    dense_offset: int | None = None
    blockdiag: int = 0
    blockdiag_offset: int | None = None
    rot2_group: int = 0
    c0_offset: int | None = None
    c1_offset: int | None = None

    @property
    def rank(self) -> int:
        """Rank rows of all experts together; 0 where there are none."""
        return sum(self.ranks)

    @property
    def is_lora(self) -> bool:
        """Is there nothing but low rank and bias?"""
        plain = SiteRows(self.layer, self.site, self.ranks, self.a_offset, self.bt_offset, self.bias_offset)
        return len(self.ranks) <= 1 and self == plain

    @property
    def has_frame(self) -> bool:
        """Does more than scales stand around the base's product?"""
        return self.blockdiag > 0 or self.rot2_group > 0

    @property
    def has_group_gate(self) -> bool:
        """Are the experts weighed by the gate of the whole MLP?"""
        return bool(self.gate_options.group)


@dataclass(frozen=True, slots=True)
class Gate:
    """How a mixture weighs its experts: weight [E, in], bias [E] fp32; see `reference.gate_weights`.

    `ranks` [E] cut the stacked A and BT of the site into experts.
    """

    weight: Tensor
    ranks: tuple[int, ...]
    top_k: int
    temperature: float
    bias: Tensor | None = None
    options: GateOptions = METEORA


@dataclass(frozen=True, slots=True)
class Sparse:
    """Channels idx [s] int32, strictly increasing, and a row of d [s, width] for each."""

    idx: Tensor
    d: Tensor


@dataclass(frozen=True, slots=True)
class SiteTensors:
    """Views into the image: a [rank, in], bt [rank, out] (the scaling is in it), bias [out].

    A gate makes the ranks experts; cols.d [s, out] meets the inputs idx, rows.d [s, in] makes the outputs idx;
    out_scale [out] and in_scale [in], fp32, frame the base's product.
    """

    a: Tensor
    bt: Tensor
    bias: Tensor | None
    gate: Gate | None = None
    cols: Sparse | None = None
    rows: Sparse | None = None
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None


class ImageError(ValueError):
    """An offset table does not fit its image, or its weights do not fit the model's dtype."""


@dataclass(frozen=True, slots=True)
class AdapterImage:
    """One adapter's bytes with their offset table.

    `shapes[site]` is (out, in) of the base's linear layer; `data` is a 1-D uint8 tensor that the caller keeps alive.
    """

    data: Tensor
    dtype: torch.dtype
    rows: tuple[SiteRows, ...]
    shapes: dict[str, tuple[int, int]]

    def site(self, rows: SiteRows) -> SiteTensors:
        """Return the typed views of one site.

        Raises:
            ImageError: an offset is unaligned or reaches past the end, or the table contradicts itself.
        """
        out_dim, in_dim = self.shapes[rows.site]
        # what the gate of a whole MLP weighs is not the site's own
        rank = 0 if rows.has_group_gate else rows.rank
        return SiteTensors(
            a=self.view(rows.a_offset, rank, in_dim),
            bt=self.view(rows.bt_offset, rank, out_dim),
            bias=self.vector(rows.bias_offset, out_dim),
            gate=self._gate(rows, in_dim),
            cols=self._sparse(rows.cols, in_dim, out_dim),
            rows=self._sparse(rows.rows, out_dim, in_dim),
            out_scale=self.vector(rows.out_scale_offset, out_dim, torch.float32),
            in_scale=self.vector(rows.in_scale_offset, in_dim, torch.float32),
        )

    def vector(self, offset: int | None, width: int, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return a vector [width] of the image's dtype or another; raises ImageError."""
        return None if offset is None else self.view(offset, 1, width, dtype)[0]

    def view(self, offset: int, num_rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a matrix [num_rows, width] of the image's dtype or another; raises ImageError."""
        dtype = dtype or self.dtype
        num_bytes = num_rows * width * dtype.itemsize
        if offset < 0 or offset % dtype.itemsize or offset + num_bytes > self.data.numel():
            raise ImageError(
                f"rows at byte {offset} ({num_rows} x {width} {dtype}) do not fit an image of "
                f"{self.data.numel()} bytes; {WAY_OUT}"
            )
        return self.data[offset : offset + num_bytes].view(dtype).view(num_rows, width)

    def _gate(self, rows: SiteRows, in_dim: int) -> Gate | None:
        num_experts = len(rows.ranks)
        if rows.gate_offset is None:
            if num_experts > 1 and not rows.has_group_gate:
                raise ImageError(f"layer {rows.layer}, {rows.site}: {num_experts} experts and no gate; {WAY_OUT}")
            return None
        if not 1 <= rows.top_k <= num_experts or not rows.temperature > 0:
            raise ImageError(
                f"layer {rows.layer}, {rows.site}: a gate cannot choose {rows.top_k} of {num_experts} experts at "
                f"temperature {rows.temperature}; {WAY_OUT}"
            )
        options = rows.gate_options
        if not options.are_known or (options.mix == "rank" and len(set(rows.ranks)) > 1):
            raise ImageError(f"layer {rows.layer}, {rows.site}: no gate is like {options}; {WAY_OUT}")
        return Gate(
            self.view(rows.gate_offset, num_experts, in_dim),
            rows.ranks,
            rows.top_k,
            rows.temperature,
            self.vector(rows.gate_bias_offset, num_experts, torch.float32),
            options,
        )

    def _sparse(self, place: SparseRows | None, num_channels: int, width: int) -> Sparse | None:
        if place is None:
            return None
        idx = self.view(place.idx_offset, 1, place.count, torch.int32)[0]
        # a step must not meet an index that torch refuses: it would fail the other rows too
        if not bool(((idx >= 0) & (idx < num_channels)).all()) or not bool((idx[1:] > idx[:-1]).all()):
            raise ImageError(f"channels at byte {place.idx_offset} are not increasing below {num_channels}; {WAY_OUT}")
        return Sparse(idx, self.view(place.d_offset, place.count, width))


WAY_OUT = "the canonical file is damaged, upload the adapter again"


def not_finite(layer: int, site: str, dtype: torch.dtype) -> str:
    """Say that a weight is NaN or infinite in the dtype that the model computes in, and the way out."""
    return (
        f"layer {layer}, {site}: a weight is not finite in {dtype}, this server's dtype; "
        "serve with --dtype float32 or bfloat16, or rescale the adapter"
    )

"""Where each site's rows lie in an adapter image: the offset table that every kernel reads.

The image is the data section of the canonical adapter file, byte for byte: layer-major, site order q, k, v, o, gate,
up, down; per site `A [rank, in]`, then the rank rows `BT [rank, out]`, then an optional `bias [out]`, each aligned to
128 bytes, at true rank. This module only reads; invariant: no view reaches outside the image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SiteRows:
    """Byte offsets of one site's tensors inside the image; `rank` may be 0 when there is only a bias."""

    layer: int
    site: str
    rank: int
    a_offset: int
    bt_offset: int
    bias_offset: int | None


@dataclass(frozen=True, slots=True)
class SiteTensors:
    """Views into the image: a [rank, in], bt [rank, out], bias [out] or None. The scaling is already in bt."""

    a: Tensor
    bt: Tensor
    bias: Tensor | None


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
            ImageError: an offset is unaligned or reaches past the end.
        """
        out_dim, in_dim = self.shapes[rows.site]
        bias = None if rows.bias_offset is None else self._view(rows.bias_offset, 1, out_dim)[0]
        return SiteTensors(
            a=self._view(rows.a_offset, rows.rank, in_dim), bt=self._view(rows.bt_offset, rows.rank, out_dim), bias=bias
        )

    def _view(self, offset: int, num_rows: int, width: int) -> Tensor:
        num_bytes = num_rows * width * self.dtype.itemsize
        if offset < 0 or offset % self.dtype.itemsize or offset + num_bytes > self.data.numel():
            raise ImageError(
                f"rows at byte {offset} ({num_rows} x {width} {self.dtype}) do not fit an image of "
                f"{self.data.numel()} bytes; the canonical file is damaged, upload the adapter again"
            )
        return self.data[offset : offset + num_bytes].view(self.dtype).view(num_rows, width)


def not_finite(layer: int, site: str, dtype: torch.dtype) -> str:
    """Say that a weight is NaN or infinite in the dtype that the model computes in, and the way out."""
    return (
        f"layer {layer}, {site}: a weight is not finite in {dtype}, this server's dtype; "
        "serve with --dtype float32 or bfloat16, or rescale the adapter"
    )

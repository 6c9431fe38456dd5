"""A stored adapter image as it is to lie in the arena: the same tensors in the model's dtype, each 128-byte aligned.

Owns where every tensor goes and writes any range of the laid-out image; allocates nothing and knows no device. Indices
and scales keep their own types. When the stored dtype is the model's, the laid-out image is the stored one, byte for
byte, and behind it what only kernels need: which expert each rank of a mixture belongs to. Invariants: nothing outside
the stored bytes is read; every byte between two tensors is written, as zero or as stored.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from adapter_kernels.gpu.tables import ALIGNMENT_BYTES, SITES
from adapter_kernels.image import ImageError, SiteRows, SparseRows, not_finite

# fields of `SiteRows` that the kernels read; an adapter with any other is refused
_SERVED = {"layer", "site", "ranks", "a_offset", "bt_offset", "bias_offset", "gate_offset", "top_k", "temperature"} | {
    "cols",
    "rows",
    "out_scale_offset",
    "in_scale_offset",
}
# what others are called; a gate's experts of a whole MLP are among the options
_WORDS = {
    "gate_options": "a gate with options beyond top-k and softmax",
    "gate_bias_offset": "a gate with a bias",
    "csr": "a sparse matrix (csr)",
    "dense_offset": "a dense change of the weight",
    "blockdiag": "turned inputs (in_blockdiag)",
    "rot2_group": "turned outputs (out_rot2)",
}
_NOT_COMPUTED = "this server's device path does not compute; serve with --device cpu"
_DAMAGED = "the canonical file is damaged, upload the adapter again"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The data section of an adapter file, usually mapped, with its offset table; `shapes[site]` is (out, in)."""

    data: memoryview
    dtype: torch.dtype
    rows: tuple[SiteRows, ...]
    shapes: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor: its byte in the stored image and in the laid-out one, its size, its type here and there."""

    layer: int
    site: str
    source: int
    target: int
    num_elements: int
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte behind it in the laid-out image."""
        return self.target + self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Span:
    """Elements that lie side by side in `data` and in the laid-out image; of equal types they are bytes."""

    data: memoryview
    source: int
    target: int
    num_elements: int
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.target + self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Where everything goes; positions in bytes from the image's begin."""

    stored: StoredImage
    dtype: torch.dtype
    # a multiple of ALIGNMENT_BYTES, and never 0: an image without any site has a place too
    num_bytes: int
    rows: tuple[SiteRows, ...]
    # by the ranks of a mixture, where the expert of each rank is written, int32
    expert_lists: Mapping[tuple[int, ...], int]
    pieces: tuple[Piece, ...]
    spans: tuple[_Span, ...]

    def fill(self, begin: int, out: Tensor, scratch: Tensor) -> None:
        """Write bytes `begin ..` of the laid-out image over all of `out`.

        Args:
            out: [*] uint8 on the host, contiguous; `begin` and its length are multiples of ALIGNMENT_BYTES.
            scratch: [*] uint8 on the host, for stored elements of another dtype: at least as many as `out` holds.
        """
        end = begin + out.numel()
        position = begin
        first = max(0, bisect_right(self.spans, begin, key=lambda span: span.target) - 1)
        for span in self.spans[first:]:
            low = max(position, span.target)
            high = min(end, span.end)
            if span.target >= end:
                break
            if high > low:
                out[position - begin : low - begin].zero_()
                _copy(span, low, out[low - begin : high - begin], scratch)
                position = high
        out[position - begin :].zero_()

    def check_finite(self, begin: int, out: Tensor) -> None:
        """Raise ImageError when a weight among the bytes that `fill` wrote is NaN or infinite in the model's dtype."""
        # one pass without temporaries, and NaN passes through: 25x faster than isfinite in bf16, EPYC, 2026-11
        if _is_finite(out.view(self.dtype)):
            return
        end = begin + out.numel()
        for piece in self.pieces:
            low, high = max(begin, piece.target), min(end, piece.end)
            if high > low and not _is_finite(out[low - begin : high - begin].view(piece.dtype)):
                raise ImageError(not_finite(piece.layer, piece.site, self.dtype))


def lay_out(stored: StoredImage, dtype: torch.dtype) -> ImageLayout:
    """Decide where each tensor of a stored image goes.

    Raises:
        ImageError: rows reach past the end of the stored image, or begin before it; an op that kernels lack.
    """
    _check_served(stored.rows)
    placing = _Placing(stored, dtype)
    rows = tuple(placing.place(row) for row in stored.rows)
    made, expert_lists = _expert_lists(stored.rows, placing.end)
    spans = [_span(stored, piece) for piece in placing.pieces]
    if made:
        spans.append(_Span(memoryview(made), 0, placing.end, len(made), torch.uint8, torch.uint8))
    num_bytes = max(placing.end + len(made), ALIGNMENT_BYTES)
    return ImageLayout(stored, dtype, num_bytes, rows, expert_lists, tuple(placing.pieces), tuple(_merged(spans)))


def _check_served(rows: tuple[SiteRows, ...]) -> None:
    """Refuse what the kernels of this package do not compute."""
    for row in rows:
        if row.site not in SITES:
            raise ImageError(f"the adapter acts on {row.site}, which {_NOT_COMPUTED}")
        for field in fields(row):
            if field.name not in _SERVED and getattr(row, field.name) != field.default:
                what = _WORDS.get(field.name, field.name)
                raise ImageError(f"layer {row.layer}, {row.site}: the adapter has {what}, which {_NOT_COMPUTED}")
        if row.gate_offset is None and len(row.ranks) > 1:
            raise ImageError(f"layer {row.layer}, {row.site}: {len(row.ranks)} experts and no gate; {_DAMAGED}")
        if row.gate_offset is not None and not (1 <= row.top_k <= len(row.ranks) and row.temperature > 0):
            raise ImageError(
                f"layer {row.layer}, {row.site}: a gate cannot choose {row.top_k} of {len(row.ranks)} experts at "
                f"temperature {row.temperature}; {_DAMAGED}"
            )


class _Placing:
    """Tensors side by side, in the order of the image."""

    def __init__(self, stored: StoredImage, dtype: torch.dtype) -> None:
        self.pieces: list[Piece] = []
        self.end = 0
        self._stored = stored
        self._dtype = dtype

    def place(self, row: SiteRows) -> SiteRows:
        """Place one site's tensors and say where."""
        out_dim, in_dim = self._stored.shapes[row.site]
        return replace(
            row,
            gate_offset=self._maybe(row, row.gate_offset, len(row.ranks) * in_dim),
            a_offset=self._put(row, row.a_offset, row.rank * in_dim) if row.rank else 0,
            bt_offset=self._put(row, row.bt_offset, row.rank * out_dim) if row.rank else 0,
            cols=self._sparse(row, row.cols, in_dim, out_dim),
            rows=self._sparse(row, row.rows, out_dim, in_dim),
            out_scale_offset=self._maybe(row, row.out_scale_offset, out_dim, torch.float32),
            in_scale_offset=self._maybe(row, row.in_scale_offset, in_dim, torch.float32),
            bias_offset=self._maybe(row, row.bias_offset, out_dim),
        )

    def _sparse(self, row: SiteRows, place: SparseRows | None, num_channels: int, width: int) -> SparseRows | None:
        if place is None:
            return None
        idx_offset = self._put(row, place.idx_offset, place.count, torch.int32)
        _check_channels(self._stored, place, num_channels)
        return SparseRows(place.count, idx_offset, self._put(row, place.d_offset, place.count * width))

    def _maybe(self, row: SiteRows, offset: int | None, count: int, dtype: torch.dtype | None = None) -> int | None:
        return None if offset is None else self._put(row, offset, count, dtype)

    def _put(self, row: SiteRows, offset: int, num_elements: int, own: torch.dtype | None = None) -> int:
        """Take the next place for a tensor of its own type, or of the image's."""
        _check_range(self._stored, row, offset, num_elements * (own or self._stored.dtype).itemsize)
        types = own or self._stored.dtype, own or self._dtype
        piece = Piece(row.layer, row.site, offset, self.end, num_elements, *types)
        self.pieces.append(piece)
        self.end = _aligned(piece.end)
        return piece.target


def _span(stored: StoredImage, piece: Piece) -> _Span:
    if piece.stored != piece.dtype:
        return _Span(stored.data, piece.source, piece.target, piece.num_elements, piece.stored, piece.dtype)
    num_bytes = piece.num_elements * piece.dtype.itemsize
    return _Span(stored.data, piece.source, piece.target, num_bytes, torch.uint8, torch.uint8)


def _copy(span: _Span, low: int, out: Tensor, scratch: Tensor) -> None:
    """Write the part of a span that begins at byte `low` of the laid-out image."""
    num_elements = out.numel() // span.dtype.itemsize
    first = (low - span.target) // span.dtype.itemsize
    num_bytes = num_elements * span.stored.itemsize
    offset = span.source + first * span.stored.itemsize
    # numpy takes a read-only map as it is, and lets other threads run while it copies
    stored = np.frombuffer(span.data, dtype=np.uint8, count=num_bytes, offset=offset)
    if span.stored == span.dtype:
        np.copyto(out.numpy(), stored)
    else:
        np.copyto(scratch[:num_bytes].numpy(), stored)
        out.view(span.dtype).copy_(scratch[:num_bytes].view(span.stored))


def _merged(spans: list[_Span]) -> list[_Span]:
    """Join bytes whose distance is the same in both images, so that a whole image of the model's dtype is one copy."""
    merged: list[_Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        is_near = last is not None and last.data is span.data and last.stored == span.stored == torch.uint8
        if last is not None and is_near and span.target - last.target == span.source - last.source:
            merged[-1] = replace(last, num_elements=span.end - last.target)
        else:
            merged.append(span)
    return merged


def _expert_lists(rows: tuple[SiteRows, ...], begin: int) -> tuple[bytes, dict[tuple[int, ...], int]]:
    """Write, for each different list of expert ranks, which expert each rank belongs to; and where it lies."""
    made, places = b"", {}
    for ranks in dict.fromkeys(row.ranks for row in rows if row.gate_offset is not None):
        places[ranks] = begin + len(made)
        experts = np.repeat(np.arange(len(ranks), dtype="<i4"), ranks).tobytes()
        made += experts + bytes(_aligned(len(experts)) - len(experts))
    return made, places


def _check_range(stored: StoredImage, row: SiteRows, offset: int, num_bytes: int) -> None:
    end = offset + num_bytes
    if offset < 0 or end > len(stored.data):
        raise ImageError(
            f"layer {row.layer}, {row.site}: bytes {offset} to {end} do not fit an image of {len(stored.data)} bytes; "
            f"{_DAMAGED}"
        )


def _check_channels(stored: StoredImage, place: SparseRows, num_channels: int) -> None:
    """Refuse channels that a kernel would read or write outside the row for, or that its search would not find."""
    idx = np.frombuffer(stored.data, dtype="<i4", count=place.count, offset=place.idx_offset)
    if ((idx < 0) | (idx >= num_channels)).any() or (idx[1:] <= idx[:-1]).any():
        raise ImageError(f"channels at byte {place.idx_offset} are not increasing below {num_channels}; {_DAMAGED}")


def _is_finite(values: Tensor) -> bool:
    if not values.is_floating_point():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

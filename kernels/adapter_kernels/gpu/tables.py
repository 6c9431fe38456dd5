"""The device tables: where the rows of every (site, adapter slot) lie in the arena.

Owns the offset table that each kernel reads one entry of per program; not the arena's extents nor who lies where.
Invariant: tensors are made once and changed in place, so a captured CUDA graph reads the adapters of today; every
offset is a multiple of 128 bytes, since kernels promise that to the compiler to get 16-byte vector loads.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.image import AdapterImage, ImageError, SiteRows

# columns of an entry; kernels read them by number (`rank_rows.load_entry`, `families.py`). Offsets count elements of
# their own type: of the arena's dtype; of 4 bytes for int32 indices and fp32 scales
A, BT, BIAS, RANK, COLS_IDX, COLS_D, NUM_COLS, ROWS_IDX, ROWS_D, NUM_ROWS, GATE, NUM_EXPERTS, EXPERT_OF_RANK = range(13)
# CHOICE: top_k in the upper 32 bits, the temperature's fp32 bits in the lower ones
CHOICE, OUT_SCALE, IN_SCALE = 13, 14, 15
COLUMNS = 16
OFFSET_COLUMNS = (A, BT, BIAS, COLS_IDX, COLS_D, ROWS_IDX, ROWS_D, GATE, EXPERT_OF_RANK, OUT_SCALE, IN_SCALE)
_WORD_COLUMNS = (COLS_IDX, ROWS_IDX, EXPERT_OF_RANK, OUT_SCALE, IN_SCALE)
WORD_BYTES = 4
# a bias or a scale that the adapter lacks; what has a count or a rank is absent where that is 0
NONE = -1
LACKING = tuple(NONE if column in (BIAS, OUT_SCALE, IN_SCALE) else 0 for column in range(COLUMNS))
ALIGNMENT_BYTES = 128
# segments of a bridge's row (ranks, gate's logits, outputs that `rows` changes) begin at multiples of this
SEGMENT = 32
# base-neutral sites of a layer, in table order
SITES = tuple(site for members in FUSED_SITES.values() for site in members)


def first_site(layer: int, fused_site: str) -> int:
    """Return the table index of a fused site's first member; the other members follow it."""
    return layer * len(SITES) + SITES.index(FUSED_SITES[fused_site][0])


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """The arena and, per site and adapter slot, where that adapter's tensors lie in it."""

    # [num_elements], the model's dtype
    arena: Tensor
    # the same memory as int32 and as fp32: where indices and scales are read
    ints: Tensor
    floats: Tensor
    # [num_sites, N, COLUMNS] int64, contiguous; `LACKING` where the adapter lacks the site
    rows: Tensor
    # [num_sites, COLUMNS] int64 on the device: an entry lands here first, so that no copy needs a temporary
    _staging: Tensor
    # [COLUMNS] int64 on the device: what "lacks the site" is written as
    _lacking: Tensor

    @classmethod
    def build(cls, num_layers: int, num_slots: int, arena: Tensor) -> "DeviceTables":
        """Allocate tables in which every slot lacks every site.

        Args:
            arena: [num_elements] flat, the model's dtype, beginning at a multiple of `ALIGNMENT_BYTES`; kept, not
                copied.
        """
        num_sites = num_layers * len(SITES)
        lacking = torch.tensor(LACKING, dtype=torch.int64, device=arena.device)
        rows = lacking.expand(num_sites, num_slots, COLUMNS).contiguous()
        staging = torch.empty(num_sites, COLUMNS, dtype=torch.int64, device=arena.device)
        words = arena[: arena.numel() * arena.itemsize // WORD_BYTES * WORD_BYTES // arena.itemsize]
        return cls(arena, words.view(torch.int32), words.view(torch.float32), rows, staging, lacking)

    @property
    def num_slots(self) -> int:
        """Number of adapter slots, N."""
        return self.rows.shape[1]

    def write(self, slot: int, entries: Tensor) -> None:
        """Fill an adapter slot, in place and on the current stream.

        Args:
            entries: [num_sites, COLUMNS] int64 as `table_entries` makes them, pinned or on the device; pinned memory
                stays the caller's until the stream has passed this call.
        Notes: one stream only; steps that read the slot are ordered after it by the caller.
        """
        self._staging.copy_(entries, non_blocking=True)
        self.rows[:, slot].copy_(self._staging)

    def clear(self, slot: int) -> None:
        """Make a slot lack every site again, in place and on the current stream."""
        self.rows[:, slot].copy_(self._lacking)


def bridge_columns(rows: SiteRows) -> int:
    """Return how many columns of a bridge's row an adapter needs at one site."""
    num_rows = 0 if rows.rows is None else rows.rows.count
    num_experts = 0 if rows.gate_offset is None else len(rows.ranks)
    return _segment(rows.rank) + _segment(num_experts) + num_rows


def element_bytes(dtype: torch.dtype) -> Tensor:
    """Return how many bytes a unit of each of `OFFSET_COLUMNS` is, for an arena of this dtype."""
    return torch.tensor([WORD_BYTES if column in _WORD_COLUMNS else dtype.itemsize for column in OFFSET_COLUMNS])


def table_entries(
    image: AdapterImage, num_layers: int, begin: int, expert_lists: Mapping[tuple[int, ...], int] | None = None
) -> Tensor:
    """Return an image's table entries, [num_sites, COLUMNS] int64 on the host.

    Args:
        image: its dtype is the arena's; only the length of its data is read. begin: element of the arena at which it
            begins. expert_lists: by the ranks of a mixture, the byte of the image at which lies, int32 for each rank,
            the expert that it belongs to.
    Raises:
        ImageError: rows reach outside the image, are not aligned, or belong to a layer that the model lacks.
    """
    entries = torch.tensor(LACKING).repeat(num_layers * len(SITES), 1)
    for rows in image.rows:
        if not 0 <= rows.layer < num_layers:
            raise ImageError(f"the image has rows for layer {rows.layer}; this model has {num_layers} layers")
        entry = _Entry(image, rows, begin)
        entry.fill(expert_lists or {})
        entries[rows.layer * len(SITES) + SITES.index(rows.site)] = torch.tensor(entry.values)
    return entries


class _Entry:
    """One site's entry in the making."""

    def __init__(self, image: AdapterImage, rows: SiteRows, begin: int) -> None:
        self.values = list(LACKING)
        self._image = image
        self._rows = rows
        self._begin = begin * image.dtype.itemsize

    def fill(self, expert_lists: Mapping[tuple[int, ...], int]) -> None:
        rows, (out_dim, in_dim) = self._rows, self._image.shapes[self._rows.site]
        self._put(A, rows.a_offset, rows.rank * in_dim)
        self._put(BT, rows.bt_offset, rows.rank * out_dim)
        self._put(BIAS, rows.bias_offset, out_dim)
        self._put(OUT_SCALE, rows.out_scale_offset, out_dim)
        self._put(IN_SCALE, rows.in_scale_offset, in_dim)
        self.values[RANK] = rows.rank
        if rows.cols is not None:
            self.values[NUM_COLS] = rows.cols.count
            self._put(COLS_IDX, rows.cols.idx_offset, rows.cols.count)
            self._put(COLS_D, rows.cols.d_offset, rows.cols.count * out_dim)
        if rows.rows is not None:
            self.values[NUM_ROWS] = rows.rows.count
            self._put(ROWS_IDX, rows.rows.idx_offset, rows.rows.count)
            self._put(ROWS_D, rows.rows.d_offset, rows.rows.count * in_dim)
        if rows.gate_offset is not None:
            self.values[NUM_EXPERTS] = len(rows.ranks)
            self.values[CHOICE] = rows.top_k << 32 | _bits(rows.temperature)
            self._put(GATE, rows.gate_offset, len(rows.ranks) * in_dim)
            self._put(EXPERT_OF_RANK, expert_lists[rows.ranks], rows.rank)

    def _put(self, column: int, offset: int | None, num_elements: int) -> None:
        """Note where a tensor lies; one without elements, or None, keeps what lacking it looks like."""
        if offset is None or num_elements == 0:
            return
        itemsize = WORD_BYTES if column in _WORD_COLUMNS else self._image.dtype.itemsize
        end, size = offset + num_elements * itemsize, self._image.data.numel()
        if offset < 0 or end > size:
            raise ImageError(
                f"layer {self._rows.layer}, {self._rows.site}: bytes {offset} to {end} do not fit an image of {size} "
                "bytes; the canonical file is damaged, upload the adapter again"
            )
        place = self._begin + offset
        if place % ALIGNMENT_BYTES:
            raise ImageError(f"rows at byte {place} of the arena are not aligned to {ALIGNMENT_BYTES} bytes")
        self.values[column] = place // itemsize


def _segment(count: int) -> int:
    return -(-count // SEGMENT) * SEGMENT


def _bits(value: float) -> int:
    """Return the bits of an fp32 number > 0."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])

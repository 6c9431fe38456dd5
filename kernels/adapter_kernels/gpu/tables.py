"""The device tables: where the rows of every (site, adapter slot) lie in the arena.

Owns the offset table that each kernel reads one entry of per program; not the arena's extents nor who lies where.
Invariant: tensors are made once and changed in place, so a captured CUDA graph reads the adapters of today; every
offset is a multiple of 128 bytes, since kernels promise that to the compiler to get 16-byte vector loads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.image import AdapterImage, ImageError

# columns of an entry: offset of A, of the rank rows BT, of the bias (-1: none), all in elements of the arena; rank
COLUMNS = 4
NO_BIAS = -1
ALIGNMENT_BYTES = 128
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
    # [num_sites, N, COLUMNS] int64, contiguous; rank 0 and bias -1: the adapter lacks this site
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
        lacking = torch.tensor([0, 0, NO_BIAS, 0], dtype=torch.int64, device=arena.device)
        rows = lacking.expand(num_sites, num_slots, COLUMNS).contiguous()
        return cls(arena, rows, torch.empty(num_sites, COLUMNS, dtype=torch.int64, device=arena.device), lacking)

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


def table_entries(image: AdapterImage, num_layers: int, begin: int) -> Tensor:
    """Return an image's table entries, [num_sites, COLUMNS] int64 on the host.

    Args:
        image: its dtype is the arena's. begin: element of the arena at which the image begins.
    Raises:
        ImageError: rows reach outside the image, are not aligned, or belong to a layer that the model lacks.
    """
    entries = torch.zeros(num_layers * len(SITES), COLUMNS, dtype=torch.int64)
    entries[:, 2] = NO_BIAS
    for rows in image.rows:
        # the views check every range against the image's end
        image.site(rows)
        if not 0 <= rows.layer < num_layers:
            raise ImageError(f"the image has rows for layer {rows.layer}; this model has {num_layers} layers")
        entries[rows.layer * len(SITES) + SITES.index(rows.site)] = torch.tensor(
            [
                _element(rows.a_offset if rows.rank else 0, image.dtype, begin),
                _element(rows.bt_offset if rows.rank else 0, image.dtype, begin),
                NO_BIAS if rows.bias_offset is None else _element(rows.bias_offset, image.dtype, begin),
                rows.rank,
            ]
        )
    return entries


def _element(offset: int, dtype: torch.dtype, begin: int) -> int:
    place = begin * dtype.itemsize + offset
    if place % ALIGNMENT_BYTES:
        raise ImageError(f"rows at byte {place} of the arena are not aligned to {ALIGNMENT_BYTES} bytes")
    return place // dtype.itemsize

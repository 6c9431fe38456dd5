"""One adapter in the arena: its table entries at any place, also halfway between two.

Owns what is needed after the load to say where each tensor lies; not the bytes. Invariant: a move is cut between
tensors only, so an adapter that is partly moved is whole: the tables name each tensor where it is now.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.image_layout import ImageLayout
from adapter_kernels.gpu.tables import NO_BIAS, table_entries
from adapter_kernels.image import AdapterImage


@dataclass(frozen=True, slots=True)
class PlacedAdapter:
    """Where an adapter's tensors lie, relative to its extent."""

    num_bytes: int
    itemsize: int
    # [num_sites, COLUMNS] as `table_entries` makes them for an extent that begins at 0
    relative: Tensor
    # where tensors begin, in bytes and ascending; last the image's end
    cuts: tuple[int, ...]
    # (layer, key of `FUSED_SITES`) where it acts
    fused_sites: frozenset[tuple[int, str]]

    @classmethod
    def of(cls, layout: ImageLayout, extent: Tensor, num_layers: int) -> "PlacedAdapter":
        """Describe a laid-out image; raises ImageError when its table does not fit it.

        Args:
            extent: [layout.num_bytes] uint8; only its length is read.
        """
        image = AdapterImage(extent, layout.dtype, layout.rows, layout.stored.shapes)
        cuts = (*(piece.target for piece in layout.pieces), layout.num_bytes)
        fused_sites = frozenset((rows.layer, fused_site_of(rows.site)) for rows in layout.rows)
        return cls(layout.num_bytes, layout.dtype.itemsize, table_entries(image, num_layers, 0), cuts, fused_sites)

    def entries(self, begin: int) -> Tensor:
        """Return the table entries of an extent that begins at this byte of the arena."""
        return self.entries_under_way(begin, begin, 0)

    def entries_under_way(self, source: int, target: int, num_moved: int) -> Tensor:
        """Return the entries when the first `num_moved` bytes, which are whole tensors, lie at `target` already."""
        offsets = self.relative[:, :3]
        begins = torch.where(offsets < num_moved // self.itemsize, target, source) // self.itemsize
        entries = self.relative.clone()
        entries[:, :3] = torch.where(offsets == NO_BIAS, NO_BIAS, offsets + begins)
        return entries

    def next_cut(self, num_moved: int, max_bytes: int) -> int:
        """Return how far a move may go on by about `max_bytes`: always at least one tensor, never a part of one."""
        following = bisect_right(self.cuts, num_moved)
        within = bisect_right(self.cuts, num_moved + max_bytes) - 1
        return self.cuts[max(following, within)]


def fused_site_of(site: str) -> str:
    """Return the fused site that holds a base-neutral one."""
    return next(name for name, members in FUSED_SITES.items() if site in members)

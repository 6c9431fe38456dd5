"""One adapter in the arena: its table entries at any place, also halfway between two.

Owns what is needed after the load to say where each tensor lies; not the bytes. Invariant: a move is cut between
tensors only, so an adapter that is partly moved is whole: the tables name each tensor where it is now.
"""

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.image_layout import ImageLayout
from adapter_kernels.gpu.tables import NONE, OFFSET_COLUMNS, element_bytes, table_entries
from adapter_kernels.image import AdapterImage


@dataclass(frozen=True, slots=True)
class PlacedAdapter:
    """Where an adapter's tensors lie, relative to its extent."""

    num_bytes: int
    # [num_sites, COLUMNS] as `table_entries` makes them for an extent that begins at 0
    relative: Tensor
    # [offset columns] bytes of what each counts
    element_bytes: Tensor
    # where tensors begin, in bytes and ascending; last the image's end
    cuts: tuple[int, ...]
    # where it acts, and by which families
    sites: ActingSites

    @classmethod
    def of(cls, layout: ImageLayout, extent: Tensor, num_layers: int) -> "PlacedAdapter":
        """Describe a laid-out image; raises ImageError when its table does not fit it.

        Args:
            extent: [layout.num_bytes] uint8; only its length is read.
        """
        image = AdapterImage(extent, layout.dtype, layout.rows, layout.stored.shapes)
        begins = (*(piece.target for piece in layout.pieces), *layout.expert_lists.values())
        cuts = (*begins, layout.num_bytes)
        relative = table_entries(image, num_layers, 0, layout.expert_lists)
        return cls(layout.num_bytes, relative, element_bytes(layout.dtype), cuts, ActingSites.of(layout.rows))

    def entries(self, begin: int) -> Tensor:
        """Return the table entries of an extent that begins at this byte of the arena."""
        return self.entries_under_way(begin, begin, 0)

    def entries_under_way(self, source: int, target: int, num_moved: int) -> Tensor:
        """Return the entries when the first `num_moved` bytes, which are whole tensors, lie at `target` already."""
        offsets = self.relative[:, list(OFFSET_COLUMNS)]
        begins = torch.where(offsets < num_moved // self.element_bytes, target, source) // self.element_bytes
        entries = self.relative.clone()
        entries[:, list(OFFSET_COLUMNS)] = torch.where(offsets == NONE, NONE, offsets + begins)
        return entries

    def next_cut(self, num_moved: int, max_bytes: int) -> int:
        """Return how far a move may go on by about `max_bytes`: always at least one tensor, never a part of one."""
        following = bisect_right(self.cuts, num_moved)
        within = bisect_right(self.cuts, num_moved + max_bytes) - 1
        return self.cuts[max(following, within)]

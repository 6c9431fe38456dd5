"""One step as the device sees it: static tensors that every layer reads, and the workspaces that every layer reuses.

Owns the shapes that the host side fills and the kernels read; no kernel and no decision. Invariant: rows lie decodes
first, then prefill chunks, never sorted by adapter (the route does that); a padding row has no adapter, slot mapping
-1 and, as a decode, context 0.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.ragged import PREFILL_TILE_ROWS
from adapter_kernels.gpu.route_forms import LARGEST_OF_FORM

if TYPE_CHECKING:
    from adapter_kernels.gpu.route import DeviceRoute
    from adapter_kernels.gpu.tables import DeviceTables


@dataclass(frozen=True, slots=True)
class DecodePart:
    """Rows `0 .. num_seqs - 1` of the step: sequences that run one token each."""

    # under CUDA graphs the bucket's size, padding rows included
    num_seqs: int
    # [S] int32: positions attended, the new one included; 0: padding row
    context_lens: Tensor
    # [S] int32: where the sequence's block ids begin in `block_ids`
    block_begins: Tensor
    # [*] int32: block tables of all sequences, end to end
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Rows `first_row .. T - 1` of the step: chunks of several tokens, cut into tiles of query rows."""

    first_row: int
    # [num_tiles] int32: the tile's chunk; -1: the tile does nothing
    tile_seq: Tensor
    # [num_tiles] int32: the tile's first row inside its chunk
    tile_row: Tensor
    # [C] int32: first row, in the step, of each chunk
    row_begins: Tensor
    # [C] int32: rows of the chunk
    lengths: Tensor
    # [C] int32: position of the chunk's first row
    starts: Tensor
    # [C] int32: where the chunk's block ids begin in `block_ids`
    block_begins: Tensor
    # [*] int32
    block_ids: Tensor
    # query rows of a tile: a power of two >= 16, the one that `tile_row` was made with
    tile_rows: int = PREFILL_TILE_ROWS


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory between the adapter ops of a step; made once, never cleared: readers select what was written."""

    # two flat fp32 buffers: the side stream fills one while a sink still reads the other
    bridges: tuple[Tensor, Tensor]
    # one flat buffer in the model's dtype: the deltas of o_proj or down_proj
    delta_buffer: Tensor
    # columns of a bridge's row and member: a power of two >= 16 that holds `bridge_columns` of every adapter
    rank_capacity: int
    # one flat buffer in the model's dtype: the inputs of a part's composed rows, once for each of their adapters
    pair_inputs: Tensor
    # rows of it
    max_pairs: int

    @classmethod
    def build(
        cls,
        *,
        max_rows: int,
        max_splits: int,
        max_members: int,
        rank_capacity: int,
        hidden_size: int,
        max_pairs: int = 0,
        max_in_width: int = 0,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Workspace":
        """Allocate for steps of up to `max_rows` rows and fused sites of up to `max_members` members.

        Args:
            max_pairs: of a part of composed rows, at most `max_rows`; 0: steps have none. max_in_width: input columns
                of the widest site, asked for with them.
        """
        assert max_pairs <= max_rows, f"bridges of {max_rows} rows for {max_pairs} pairs"
        # the large blocks of a prefill have one plane
        planes_of_rows = max(max_splits * min(max_rows, LARGEST_OF_FORM[-1]), max_rows)
        size = planes_of_rows * max_members * rank_capacity
        bridges = (
            torch.empty(size, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )
        deltas = torch.empty(max_rows * hidden_size, dtype=dtype, device=device)
        pair_inputs = torch.empty(max_pairs * max_in_width, dtype=dtype, device=device)
        return cls(bridges, deltas, rank_capacity, pair_inputs, max_pairs)

    def bridge(self, index: int, num_splits: int, num_rows: int, num_members: int) -> Tensor:
        """View buffer 0 or 1 as [num_splits, T, members, rank_capacity] fp32."""
        shape = (num_splits, num_rows, num_members, self.rank_capacity)
        return self.bridges[index][: num_splits * num_rows * num_members * self.rank_capacity].view(shape)

    def delta(self, num_rows: int, width: int) -> Tensor:
        """View the delta buffer as [T, width]."""
        return self.delta_buffer[: num_rows * width].view(num_rows, width)

    def pair_input(self, num_pairs: int, width: int) -> Tensor:
        """View the pairs' buffer as [P, width]."""
        return self.pair_inputs[: num_pairs * width].view(num_pairs, width)


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of one step: where their rows lie, which rows of the step they own, where they act."""

    tables: "DeviceTables"
    route: "DeviceRoute"
    # at others than `sites.fused` nothing is launched
    sites: ActingSites
    workspace: Workspace


@dataclass(frozen=True, slots=True)
class ComposedPart:
    """Some composed rows of a step, each spread out into pairs with its adapters; see `composed_rows.PairArrays`."""

    # the pairs by adapter: what the shrink runs on
    route: "DeviceRoute"
    # [P] int32: the pair's row of the step
    row_of: Tensor
    # [P] fp32
    weights: Tensor
    # [B, 4] int32: by composition
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class StepComposition:
    """The compositions of one step: the rows they act on, in parts, and where their adapters act."""

    tables: "DeviceTables"
    # at others nothing is launched
    sites: ActingSites
    workspace: Workspace
    parts: tuple[ComposedPart, ...]


@dataclass(frozen=True, slots=True)
class SiteInput:
    """What adapters that are more than low rank and bias need of the base's layer at one fused site."""

    # [T, D] contiguous: the layer's input, before any scale
    x: Tensor
    # [O], the members' side by side; None: the base has none
    base_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class SiteAdapters:
    """What a sink needs of the adapters at one fused site."""

    tables: "DeviceTables"
    route: "DeviceRoute"
    # [num_splits, T, members, rank_capacity] fp32
    bridge: Tensor
    # site index of the fused site's first member
    first_site: int
    num_splits: int
    # None: all adapters of the step are low rank and bias, and the other families' code is left out
    families: SiteInput | None = None


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """Everything that a forward pass needs besides weights and KV cache."""

    num_rows: int
    # [T] int32
    token_ids: Tensor
    # [T] int32
    positions: Tensor
    # [T] int32: flat cache row `block * block_size + offset` of each token; -1: padding, nothing is written
    slot_mapping: Tensor
    decodes: DecodePart | None
    prefills: PrefillPart | None
    # None: no row of the step has one adapter of its own
    adapters: StepAdapters | None
    # None: no row has several, or one with a weight
    composition: StepComposition | None = None

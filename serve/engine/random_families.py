"""Random adapters of the other families on the device: what benchmarks run in the place of S2FT and MeteoRA uploads.

Owns their sizes and where they lie; `RandomAdapters` runs them. Invariant: each lies in the arena at the place and with
the bytes of an uploaded one, so a step reads what serving would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.placed_adapter import PlacedAdapter
from adapter_kernels.gpu.tables import (
    ALIGNMENT_BYTES,
    COLS_IDX,
    EXPERT_OF_RANK,
    NUM_COLS,
    NUM_EXPERTS,
    NUM_ROWS,
    RANK,
    ROWS_IDX,
    SITES,
    DeviceTables,
    bridge_columns,
    element_bytes,
    table_entries,
)
from adapter_kernels.image import AdapterImage, SiteRows, SparseRows
from serve.engine.random_steps import RandomAdapters, random_workspace
from serve.model.spec import ModelSpec

# KERNELS 5: of S2FT 64 channels per layer, of MeteoRA 28 experts of rank 8, the best two per token
_CHANNELS_PER_SITE = 16
_NUM_EXPERTS, _EXPERT_RANK, _TOP_K = 28, 8, 2


@dataclass(frozen=True, slots=True)
class RandomFamily:
    """Adapters of one family, and the bytes of one."""

    adapters: RandomAdapters
    bytes_per_adapter: int


class _Places:
    """Byte offsets, one behind the other."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, num_elements: int, itemsize: int) -> int:
        begin = self.end
        self.end += -(-num_elements * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return begin


MakeRows = Callable[[ModelSpec, int, _Places], tuple[SiteRows, ...]]


def s2ft_rows(spec: ModelSpec, itemsize: int, places: _Places) -> tuple[SiteRows, ...]:
    """Slices as S2FT selects them: outputs of v and up, inputs of o and down."""
    rows = []
    for layer in range(spec.dims.num_hidden_layers):
        for site in ("v_proj", "o_proj", "up_proj", "down_proj"):
            out_dim, in_dim = spec.dims.site_shape(site)
            is_rows = site in ("v_proj", "up_proj")
            idx = places.take(_CHANNELS_PER_SITE, 4)
            d = places.take(_CHANNELS_PER_SITE * (in_dim if is_rows else out_dim), itemsize)
            sparse = SparseRows(_CHANNELS_PER_SITE, idx, d)
            plain = SiteRows(layer, site, (), 0, 0, None)
            rows.append(replace(plain, rows=sparse) if is_rows else replace(plain, cols=sparse))
    return tuple(rows)


def meteora_rows(
    spec: ModelSpec, itemsize: int, places: _Places, *, sites: tuple[str, ...] = SITES
) -> tuple[SiteRows, ...]:
    """A bundle of experts behind a gate at every site, or at some."""
    ranks, rows = (_EXPERT_RANK,) * _NUM_EXPERTS, []
    for layer in range(spec.dims.num_hidden_layers):
        for site in sites:
            out_dim, in_dim = spec.dims.site_shape(site)
            gate = places.take(_NUM_EXPERTS * in_dim, itemsize)
            a, bt = places.take(sum(ranks) * in_dim, itemsize), places.take(sum(ranks) * out_dim, itemsize)
            rows.append(SiteRows(layer, site, ranks, a, bt, None, gate_offset=gate, top_k=_TOP_K))
    return tuple(rows)


def random_family(
    spec: ModelSpec, make_rows: MakeRows, num_adapters: int, dtype: torch.dtype, device: torch.device, *, max_rows: int
) -> RandomFamily:
    """Fill an arena with adapters of one family; `make_rows` is one of the two above."""
    dims, places = spec.dims, _Places()
    rows = make_rows(spec, dtype.itemsize, places)
    lists = {own.ranks: places.take(own.rank, 4) for own in rows[:1] if own.gate_offset is not None}
    size = places.end
    arena = torch.empty(size * num_adapters // dtype.itemsize, dtype=dtype, device=device).normal_(0.0, 0.02)
    tables = DeviceTables.build(dims.num_hidden_layers, num_adapters, arena)
    shapes = {site: dims.site_shape(site) for site in SITES}
    image = AdapterImage(torch.empty(size, dtype=torch.uint8, device="meta"), dtype, rows, shapes)
    relative = table_entries(image, dims.num_hidden_layers, 0, lists)
    placed = PlacedAdapter(size, relative, element_bytes(dtype), (0, size), ActingSites.of(rows))
    for slot in range(num_adapters):
        entries = placed.entries(slot * size)
        _write_numbers(tables, entries, shapes)
        tables.write(slot, entries)
    capacity = max(16, 1 << (max(map(bridge_columns, rows)) - 1).bit_length())
    workspace = random_workspace(spec, capacity, dtype, device, max_rows=max_rows)
    sites = tuple(dict.fromkeys(own.site for own in rows))
    return RandomFamily(RandomAdapters(tables, workspace, dims.num_hidden_layers, sites, has_families=True), size)


def _write_numbers(tables: DeviceTables, entries: Tensor, shapes: dict[str, tuple[int, int]]) -> None:
    """Write what must be no random bits: channels spread over the width, and each rank's expert."""
    for index, entry in enumerate(entries.tolist()):
        out_dim, in_dim = shapes[SITES[index % len(SITES)]]
        for place, count, width in ((COLS_IDX, NUM_COLS, in_dim), (ROWS_IDX, NUM_ROWS, out_dim)):
            channels = torch.arange(entry[count], dtype=torch.int32) * (width // max(entry[count], 1))
            tables.ints[entry[place] : entry[place] + entry[count]] = channels.to(tables.ints.device)
        if entry[NUM_EXPERTS]:
            experts = torch.arange(entry[NUM_EXPERTS], dtype=torch.int32).repeat_interleave(_EXPERT_RANK)
            begin = entry[EXPERT_OF_RANK]
            tables.ints[begin : begin + entry[RANK]] = experts.to(tables.ints.device)

"""Random adapters and synthetic steps, made on the device: what tuning and benchmarks run instead of requests.

Owns shapes only, no measurement. Invariants: adapters lie in the arena as images do, one after the other at true rank,
so a step reads the bytes that serving would; everything that a pass needs anew each step (the route) is rebuilt by
`RandomStep.prepare`, so a captured pass has the launches of a served one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.ragged import chunk_tiles, ragged_blocks
from adapter_kernels.gpu.route import RouteBuffers, build_route
from adapter_kernels.gpu.shrink import num_splits
from adapter_kernels.gpu.step import DecodePart, DeviceStep, PrefillPart, StepAdapters, Workspace
from adapter_kernels.gpu.tables import ALIGNMENT_BYTES, BT, LACKING, RANK, SITES, A, DeviceTables
from serve.model.kv_cache import KvCache
from serve.model.spec import ModelSpec

BLOCK_SIZE = 16
_MAX_SPLITS = 8


@dataclass(frozen=True, slots=True)
class RoutedAdapters:
    """The adapters of one step, and the launches that group its rows by them."""

    adapters: StepAdapters
    rebuild_route: Callable[[], object]


@dataclass(frozen=True, slots=True)
class RandomStep:
    """One step; `prepare` launches what comes before the first layer."""

    inputs: DeviceStep
    prepare: Callable[[], object]


@dataclass(frozen=True, slots=True)
class RandomAdapters:
    """N random adapters of one size, and what their kernels work in."""

    tables: DeviceTables
    workspace: Workspace
    num_layers: int
    sites: tuple[str, ...]
    # more than low rank
    has_families: bool = False

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        rank: int,
        num_adapters: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_rows: int,
        sites: tuple[str, ...] = SITES,
    ) -> "RandomAdapters":
        """Fill an arena with adapters that act on the given sites of every layer."""
        dims = spec.dims
        entries, size = _entries(spec, rank, dtype, sites)
        # so small that no activation overflows, however many layers add up
        arena = torch.empty(size * num_adapters, dtype=dtype, device=device).normal_(0.0, 0.02)
        tables = DeviceTables.build(dims.num_hidden_layers, num_adapters, arena)
        for slot in range(num_adapters):
            shifted = entries.clone()
            shifted[shifted[:, RANK] > 0, :2] += slot * size
            tables.write(slot, shifted)
        workspace = random_workspace(spec, max(16, 1 << (rank - 1).bit_length()), dtype, device, max_rows=max_rows)
        return cls(tables, workspace, dims.num_hidden_layers, sites)

    def route(self, slots: Sequence[int]) -> RoutedAdapters:
        """The adapters of a step whose row t has adapter slot `slots[t]`, -1: none."""
        device = self.tables.arena.device
        order = list(dict.fromkeys(slot for slot in slots if slot >= 0))
        bucket = {-1: 0} | {slot: index + 1 for index, slot in enumerate(order)}
        local, slot_of = _int32([bucket[slot] for slot in slots], device), _int32([-1, *order], device)
        buffers = RouteBuffers.build(_int32(slots, device), len(slot_of))

        def rebuild() -> object:
            return build_route(local, slot_of, buffers, len(slots))

        fused = [name for name, members in FUSED_SITES.items() if set(members) & set(self.sites)]
        acting = frozenset((layer, name) for layer in range(self.num_layers) for name in fused)
        sites = ActingSites(acting, self.has_families)
        route = build_route(local, slot_of, buffers, len(slots))
        return RoutedAdapters(StepAdapters(self.tables, route, sites, self.workspace), rebuild)


def random_workspace(
    spec: ModelSpec, bridge_columns: int, dtype: torch.dtype, device: torch.device, *, max_rows: int
) -> Workspace:
    """Make the workspace of steps of up to `max_rows` rows."""
    return Workspace.build(
        max_rows=max_rows,
        # variants may split finer than `num_splits` says
        max_splits=max(_MAX_SPLITS, num_splits(spec.dims.intermediate_size)),
        max_members=3,
        rank_capacity=bridge_columns,
        hidden_size=spec.dims.hidden_size,
        dtype=dtype,
        device=device,
    )


def random_kv(spec: ModelSpec, num_tokens: int, dtype: torch.dtype, device: torch.device) -> KvCache:
    """Allocate a cache for so many positions in all, filled with random values: zeros are kinder than life."""
    kv = KvCache.build(spec, num_tokens // BLOCK_SIZE + 1, BLOCK_SIZE, dtype, device)
    for cache in (*kv.k, *kv.v):
        cache.normal_()
    return kv


def decode_step(
    spec: ModelSpec, num_seqs: int, context: int, routed: RoutedAdapters | None, device: torch.device
) -> RandomStep:
    """One token of each of `num_seqs` sequences, the last of `context` positions."""
    per_seq = -(-context // BLOCK_SIZE)
    tables = [list(range(seq * per_seq, (seq + 1) * per_seq)) for seq in range(num_seqs)]
    blocks = ragged_blocks([context] * num_seqs, tables, BLOCK_SIZE)
    last = context - 1
    part = DecodePart(
        num_seqs,
        _int32([context] * num_seqs, device),
        torch.from_numpy(blocks.begins).to(device),
        torch.from_numpy(blocks.ids).to(device),
    )
    inputs = DeviceStep(
        num_rows=num_seqs,
        token_ids=_random_tokens(spec, num_seqs, device),
        positions=_int32([last] * num_seqs, device),
        slot_mapping=_int32([table[-1] * BLOCK_SIZE + last % BLOCK_SIZE for table in tables], device),
        decodes=part,
        prefills=None,
        adapters=None if routed is None else routed.adapters,
    )
    return RandomStep(inputs, _nothing if routed is None else routed.rebuild_route)


def prefill_step(spec: ModelSpec, num_tokens: int, routed: RoutedAdapters | None, device: torch.device) -> RandomStep:
    """One prompt of `num_tokens` tokens, in one chunk."""
    tiles = chunk_tiles([0], [num_tokens], 0)
    part = PrefillPart(
        first_row=0,
        tile_seq=torch.from_numpy(tiles.tile_seq).to(device),
        tile_row=torch.from_numpy(tiles.tile_row).to(device),
        row_begins=torch.from_numpy(tiles.row_begins).to(device),
        lengths=torch.from_numpy(tiles.lengths).to(device),
        starts=torch.from_numpy(tiles.starts).to(device),
        block_begins=_int32([0], device),
        block_ids=_int32(range(-(-num_tokens // BLOCK_SIZE)), device),
    )
    inputs = DeviceStep(
        num_rows=num_tokens,
        token_ids=_random_tokens(spec, num_tokens, device),
        positions=_int32(range(num_tokens), device),
        slot_mapping=_int32(range(num_tokens), device),
        decodes=None,
        prefills=part,
        adapters=None if routed is None else routed.adapters,
    )
    return RandomStep(inputs, _nothing if routed is None else routed.rebuild_route)


def _entries(spec: ModelSpec, rank: int, dtype: torch.dtype, sites: tuple[str, ...]) -> tuple[Tensor, int]:
    """Table entries of one adapter that begins at element 0, [num_sites, COLUMNS], and its elements."""
    dims = spec.dims
    unit, size = ALIGNMENT_BYTES // dtype.itemsize, 0
    entries = torch.tensor(LACKING).repeat(dims.num_hidden_layers * len(SITES), 1)
    for layer in range(dims.num_hidden_layers):
        for site in sites:
            out_dim, in_dim = dims.site_shape(site)
            a, bt = size, size + -(-rank * in_dim // unit) * unit
            size = bt + -(-rank * out_dim // unit) * unit
            entries[layer * len(SITES) + SITES.index(site), [A, BT, RANK]] = torch.tensor([a, bt, rank])
    return entries, size


def _random_tokens(spec: ModelSpec, count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(spec.dims.vocab_size, (count,), generator=generator, dtype=torch.int32).to(device)


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)


def _nothing() -> None:
    return None

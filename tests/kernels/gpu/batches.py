"""Random adapters in device tables and random batches over them, for every kernel test of the GPU path.

Owns the popularity distributions and the layout of a small arena; no expected values (those are `reference`'s).
Invariant: all is drawn from the seed, and gaps between images are NaN, so that a read outside an adapter's rows shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels import reference
from adapter_kernels.gpu.route import DeviceRoute, block_capacity
from adapter_kernels.gpu.route_forms import block_rows_for
from adapter_kernels.gpu.tables import ALIGNMENT_BYTES, SITES, DeviceTables, table_entries
from adapter_kernels.image import AdapterImage, SiteRows

POPULARITIES = ("distinct", "uniform", "zipf", "skewed", "identical")
RAGGED_ROWS = (1, 17, 63, 133)
RANKS = (1, 3, 8, 16, 17, 64, 256)
_ZIPF_EXPONENT = 1.5
_LACKED_SITES = ("k_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step by adapter, as the host sends them: what a device route is built from."""

    # [T] int32: 0: no adapter, i: the i-th adapter of this step
    local: Tensor
    # [num_buckets] int32: adapter slot of each bucket, slot_of[0] = -1
    slot_of: Tensor
    # [T] int32: adapter slot per row, -1: none
    slots: Tensor

    @property
    def num_rows(self) -> int:
        """T."""
        return self.local.shape[0]


def rank_capacity(ranks: Sequence[int]) -> int:
    """Columns of a bridge for these ranks: the next power of two, at least 16."""
    return max(16, 1 << (max(ranks) - 1).bit_length())


def random_image(
    shapes: dict[str, tuple[int, int]],
    ranks: dict[tuple[int, str], int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    biased: frozenset[tuple[int, str]] = frozenset(),
    *,
    filled: float | None = None,
) -> AdapterImage:
    """Build an image of any shapes with a rank per (layer, site); gaps are NaN, `filled` replaces every weight."""
    unit = ALIGNMENT_BYTES // dtype.itemsize
    chunks: list[Tensor] = []
    rows = []

    def put(num_rows: int, width: int, scale: float) -> int:
        begin = sum(chunk.numel() for chunk in chunks)
        count = num_rows * width
        values = torch.randn(count, generator=generator) * scale if filled is None else torch.full((count,), filled)
        chunks.extend([values.to(dtype), torch.full((-count % unit,), torch.nan, dtype=dtype)])
        return begin * dtype.itemsize

    for layer, site in sorted(ranks.keys() | biased, key=lambda key: (key[0], SITES.index(key[1]))):
        rank = ranks.get((layer, site), 0)
        out_dim, in_dim = shapes[site]
        # of the order of one after each product, so that fp16 neither overflows nor vanishes
        a = put(rank, in_dim, in_dim**-0.5)
        bt = put(rank, out_dim, max(rank, 1) ** -0.5)
        bias = put(1, out_dim, 1.0) if (layer, site) in biased else None
        rows.append(SiteRows(layer, site, (rank,) if rank else (), a, bt, bias))
    data = torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype)
    return AdapterImage(data.view(torch.uint8), dtype, tuple(rows), shapes)


def tables_of(images: Sequence[AdapterImage], num_layers: int, dtype: torch.dtype) -> DeviceTables:
    """Lay images side by side in an arena, image i at adapter slot i, NaN between them."""
    gap = torch.full((ALIGNMENT_BYTES // dtype.itemsize,), torch.nan, dtype=dtype)
    begins, chunks, place = [], [], 0
    for image in images:
        chunks.extend([gap, image.data.view(dtype)])
        begins.append(place + gap.numel())
        place = begins[-1] + chunks[-1].numel()
    tables = DeviceTables.build(num_layers, len(images), torch.cat([*chunks, gap]))
    for slot, (image, begin) in enumerate(zip(images, begins, strict=True)):
        tables.write(slot, table_entries(image, num_layers, begin))
    return tables


def random_tables(
    shapes: dict[str, tuple[int, int]],
    ranks: Sequence[int],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_layers: int = 1,
) -> DeviceTables:
    """Build one adapter per entry of `ranks`, rank 0 being an adapter without any rows.

    Every third adapter lacks k_proj, up_proj and down_proj, the next one has biases as well (k_proj's without rank),
    and ranks differ between sites: v_proj and gate_proj have about half.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    for index, rank in enumerate(ranks):
        keys = [(layer, site) for layer in range(num_layers) for site in SITES if site in shapes]
        per_site = {key: max(1, rank // 2) if key[1] in ("v_proj", "gate_proj") else rank for key in keys if rank}
        biased: frozenset[tuple[int, str]] = frozenset()
        if index % 3 == 1:
            per_site = {
                key: value for key, value in per_site.items() if key[1] not in ("k_proj", "up_proj", "down_proj")
            }
        elif index % 3 == 2 and rank:
            biased = frozenset(key for key in keys if key[1] in ("q_proj", "k_proj", "gate_proj", "up_proj", "o_proj"))
            per_site = {key: value for key, value in per_site.items() if key[1] != "k_proj"}
        images.append(random_image(shapes, per_site, generator, dtype, biased))
    return tables_of(images, num_layers, dtype)


def random_batch(num_rows: int, num_slots: int, popularity: str, seed: int = 0, *, padding_rows: int = 0) -> Batch:
    """Draw the adapter of each row; about one row in five has none, and one bucket of the step stays empty.

    distinct: a new adapter per row (as far as there are slots); uniform: about sqrt(T) adapters, equally likely; zipf:
    all slots, Zipf 1.5; skewed: nine rows of ten have one adapter; identical: one adapter. The last `padding_rows`
    rows have none.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_slots, generator=generator)[_choices(num_rows, num_slots, popularity, generator)]
    bare = torch.rand(num_rows, generator=generator) < 0.2
    bare[num_rows - padding_rows :] = True
    # one row keeps its adapter even in the smallest batch
    bare[0] = False
    return batch_of([None if is_bare else int(slot) for slot, is_bare in zip(slots, bare, strict=True)])


def batch_of(slots: Sequence[int | None]) -> Batch:
    """Make the batch in which row t has adapter slot `slots[t]`; its buckets are followed by an empty one."""
    order = list(dict.fromkeys(slot for slot in slots if slot is not None))
    bucket = {None: 0} | {slot: index + 1 for index, slot in enumerate(order)}
    return Batch(
        local=torch.tensor([bucket[slot] for slot in slots], dtype=torch.int32),
        slot_of=torch.tensor([-1, *order, order[0] if order else -1], dtype=torch.int32),
        slots=torch.tensor([-1 if slot is None else slot for slot in slots], dtype=torch.int32),
    )


def route_of(batch: Batch, block_rows: int | None = None) -> DeviceRoute:
    """Build the device route by the reference, without a kernel; `block_rows` overrides what T would choose."""
    chosen = block_rows_for(batch.num_rows) if block_rows is None else block_rows
    if chosen == 1:
        nothing = torch.empty(0, dtype=torch.int32)
        return DeviceRoute(batch.slots, nothing, batch.slots, nothing, nothing, 1)
    capacity = block_capacity(batch.num_rows, batch.slot_of.shape[0], chosen)
    rows = reference.group_rows(batch.local, batch.slot_of, chosen, capacity)
    return DeviceRoute(batch.slots, rows.perm, rows.block_slot, rows.block_start, rows.block_len, chosen)


def _choices(num_rows: int, num_slots: int, popularity: str, generator: torch.Generator) -> Tensor:
    if popularity == "distinct":
        return torch.arange(num_rows) % num_slots
    if popularity == "identical":
        return torch.zeros(num_rows, dtype=torch.int64)
    if popularity == "uniform":
        num_used = min(num_slots, max(1, round(num_rows**0.5)))
        return torch.randint(num_used, (num_rows,), generator=generator)
    if popularity == "skewed":
        others = torch.randint(num_slots, (num_rows,), generator=generator)
        return torch.where(torch.rand(num_rows, generator=generator) < 0.9, torch.zeros_like(others), others)
    assert popularity == "zipf", f"no popularity {popularity!r}; there are {POPULARITIES}"
    weights = torch.arange(1, num_slots + 1, dtype=torch.float64) ** -_ZIPF_EXPONENT
    return torch.multinomial(weights, num_rows, replacement=True, generator=generator)

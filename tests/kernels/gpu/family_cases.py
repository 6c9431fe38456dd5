"""Adapters of every family on the device, laid out as serving lays them out, and one site's launches over them.

Owns the images and the way from a batch to a fused site's output; expectations are `reference`'s. Invariant: whatever
the launches must not read is NaN: gaps of the arena, the bridge before the shrink, outputs before they are written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.image_layout import StoredImage, lay_out
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.placed_adapter import PlacedAdapter
from adapter_kernels.gpu.scale_input import scale_input
from adapter_kernels.gpu.shrink import shrink
from adapter_kernels.gpu.step import SiteAdapters, SiteInput
from adapter_kernels.gpu.tables import SITES, DeviceTables, first_site
from adapter_kernels.image import AdapterImage
from tests.kernels.gpu.batches import Batch, route_of
from tests.kernels.random_adapters import ALL_SITES, SHAPES, Ops, Place, random_adapter

# more columns than one program of the shrink fills
CAPACITY = 128
SHRINK = LaunchConfig(block_k=32, block_r=32)


def everywhere(ops: Ops, num_layers: int = 1) -> dict[Place, Ops]:
    return {(layer, site): ops for layer in range(num_layers) for site in ALL_SITES}


def family_ops() -> dict[str, dict[Place, Ops]]:
    """Mixtures of equal and unequal ranks, slices, scales, a LoRA, and one adapter that does everything somewhere."""
    return {
        "meteora": everywhere(Ops((2,) * 9, top_k=2)),
        "meteora-unequal": everywhere(Ops((1, 4, 2, 8), top_k=2, temperature=0.3)),
        "lora": everywhere(Ops((4,))),
        "s2ft": {
            (0, "v_proj"): Ops(rows=3),
            (0, "o_proj"): Ops(cols=5),
            (0, "up_proj"): Ops(rows=17),
            (0, "down_proj"): Ops(cols=18),
        },
        "dora": everywhere(Ops((3,), out_scale=True)),
        "ia3": {(0, "k_proj"): Ops(out_scale=True), (0, "down_proj"): Ops(in_scale=True)},
        "everything": {
            (0, "q_proj"): Ops((2, 3), top_k=1, cols=2, bias=True),
            (0, "k_proj"): Ops((3,), rows=2, in_scale=True),
            (0, "v_proj"): Ops(cols=1, rows=8, in_scale=True, out_scale=True),
            (0, "o_proj"): Ops((1, 2, 3), top_k=3, rows=1, cols=3, out_scale=True, in_scale=True, bias=True),
            (0, "up_proj"): Ops((1,) * 19, top_k=2, out_scale=True, rows=5),
            (0, "down_proj"): Ops(rows=16, bias=True),
        },
    }


def family_images(
    dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, int]] = SHAPES
) -> list[AdapterImage]:
    """One adapter of each, weights of the order of a half."""
    images = []
    for seed, ops in enumerate(family_ops().values()):
        image = random_adapter(ops, torch.Generator().manual_seed(seed), dtype)
        for rows in image.rows:
            site = image.site(rows)
            for tensor in (site.a, site.bt, *(own.d for own in (site.cols, site.rows) if own is not None)):
                tensor.mul_(0.4)
        images.append(image)
    return images


def laid_out_tables(images: Sequence[AdapterImage], num_layers: int, dtype: torch.dtype) -> DeviceTables:
    """Lay images out in the model's dtype, image i at adapter slot i, NaN between them."""
    gap = torch.full((128,), 255, dtype=torch.uint8)
    chunks, placed, begins = [gap], [], []
    for image in images:
        data = memoryview(image.data.numpy().tobytes())
        layout = lay_out(StoredImage(data, image.dtype, image.rows, image.shapes), dtype)
        extent = torch.empty(layout.num_bytes, dtype=torch.uint8)
        layout.fill(0, extent, torch.empty(2 * layout.num_bytes, dtype=torch.uint8))
        begins.append(sum(chunk.numel() for chunk in chunks))
        placed.append(PlacedAdapter.of(layout, extent, num_layers))
        chunks += [extent, gap]
    tables = DeviceTables.build(num_layers, len(images), torch.cat(chunks).view(dtype))
    for slot, (adapter, begin) in enumerate(zip(placed, begins, strict=True)):
        tables.write(slot, adapter.entries(begin))
    return tables


@dataclass(frozen=True, slots=True)
class FamilySite:
    """One fused site of layer 0: its base, the input of a batch, and the adapters on the device."""

    name: str
    images: list[AdapterImage]
    tables: DeviceTables
    batch: Batch
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def build(
        cls,
        name: str,
        batch: Batch,
        dtype: torch.dtype,
        *,
        has_bias: bool = True,
        images: list[AdapterImage] | None = None,
    ) -> "FamilySite":
        generator = torch.Generator().manual_seed(len(name) + batch.num_rows)
        images = images or family_images(dtype)
        members = FUSED_SITES[name]
        in_dim, out_dim = SHAPES[members[0]][1], sum(SHAPES[site][0] for site in members)
        x = torch.randn(batch.num_rows, in_dim, generator=generator).to(dtype)
        weight = (torch.randn(out_dim, in_dim, generator=generator) * in_dim**-0.5).to(dtype)
        bias = torch.randn(out_dim, generator=generator).to(dtype) if has_bias else None
        return cls(name, images, laid_out_tables(images, 1, dtype), batch, x, weight, bias)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each member."""
        return tuple(SHAPES[site][0] for site in FUSED_SITES[self.name])

    @property
    def owners(self) -> list[AdapterImage | None]:
        """Each row's adapter."""
        return [None if slot < 0 else self.images[slot] for slot in self.batch.slots.tolist()]

    def base(self) -> Tensor:
        """The base's product of the scaled inputs, member by member."""
        scaled_sites = ActingSites.union(ActingSites.of(image.rows) for image in self.images).in_scaled
        parts, begin = [], 0
        for site, width in zip(FUSED_SITES[self.name], self.widths, strict=True):
            x = self.x
            if (0, site) in scaled_sites:
                x = torch.full_like(self.x, torch.nan)
                scale_input(self.x, self.tables, SITES.index(site), self.batch.slots, x)
            own = slice(begin, begin + width)
            parts.append(functional.linear(x, self.weight[own], None if self.bias is None else self.bias[own]))
            begin += width
        return torch.cat(parts, dim=1)

    def shrunk(self, *, splits: int = 1, block_rows: int | None = None) -> SiteAdapters:
        """Launch the shrink into a bridge of NaN."""
        route = route_of(self.batch, block_rows)
        site, members = first_site(0, self.name), len(self.widths)
        bridge = torch.full((splits, self.batch.num_rows, members, CAPACITY), torch.nan)
        shrink(self.x, self.tables, site, members, route, bridge, has_families=True, config=SHRINK)
        return SiteAdapters(self.tables, route, bridge, site, splits, SiteInput(self.x, self.bias))

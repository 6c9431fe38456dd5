"""Steps of mixed adapters for the CPU path: images in poisoned slabs, every fused site run beside the definition."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.extras import AdapterExtras
from adapter_kernels.image import AdapterImage
from adapter_kernels.native_cpu import CpuKernels
from adapter_kernels.profile import Profile
from adapter_kernels.rare_image import read_rare_sites
from adapter_kernels.reference import fused_output
from adapter_kernels.route import Placement, build_route
from adapter_kernels.slab import CAPACITY, Slab
from tests.kernels.random_adapters import SHAPES

# relative to the largest reference value; bf16 and fp16 round the bridge once and the sum once per op
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Base:
    """A base layer; `adapter_kernels.delta.BaseLinear`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


def random_base(site: str, generator: torch.Generator, dtype: torch.dtype, *, has_bias: bool = True) -> Base:
    """A base layer of a fused site."""
    members = FUSED_SITES[site]
    out_dim, in_dim = sum(SHAPES[member][0] for member in members), SHAPES[members[0]][1]
    weight = torch.randn(out_dim, in_dim, generator=generator) / in_dim**0.5
    return Base(weight.to(dtype), torch.randn(out_dim, generator=generator).to(dtype) if has_bias else None)


def place(images: Sequence[AdapterImage], dtype: torch.dtype) -> list[Placement]:
    """Write images into slabs, unused positions poisoned with NaN."""
    slabs: dict[Profile, list[Placement]] = {}
    placements: list[Placement] = []
    for image in images:
        profile = Profile.of(image)
        free = slabs.setdefault(profile, [])
        if not free:
            slab = Slab(profile, SHAPES, dtype)
            poison(slab)
            free.extend(Placement(len(placements), slab, position) for position in range(CAPACITY))
        placement = free.pop(0)
        placement.slab.write(placement.position, image)
        rare = read_rare_sites(image, dtype)
        placements.append(replace(placement, extras=AdapterExtras(rare) if rare else None))
    return placements


def poison(slab: Slab) -> None:
    """Fill every weight with NaN and every index with a channel that exists."""
    for _, _, tensor in slab.tensors():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


def in_place_order(places: list[Placement | None], counts: list[int]) -> list[int]:
    """Order sequences as the batch does: base, adapters by where they lie."""
    return sorted(range(len(counts)), key=lambda i: _place_order(places[i]))


def _place_order(placement: Placement | None) -> tuple[int, int]:
    return (-1, 0) if placement is None else (placement.slab_id, placement.position)


def check_step(
    images: Sequence[AdapterImage],
    chosen: list[int | None],
    counts: list[int],
    dtype: torch.dtype,
    seed: int = 0,
    kernels: CpuKernels | None = None,
) -> None:
    """Run sequence i with `counts[i]` rows of adapter `chosen[i]` at every site; compare with the reference."""
    generator = torch.Generator().manual_seed(seed)
    places = place(images, dtype)
    order = in_place_order([None if i is None else places[i] for i in chosen], counts)
    chosen, counts = [chosen[i] for i in order], [counts[i] for i in order]
    route = build_route([None if i is None else places[i] for i in chosen], counts)
    delta = CpuDelta(route, kernels=kernels)
    owners = [None if i is None else images[i] for i, count in zip(chosen, counts, strict=True) for _ in range(count)]
    idle = torch.tensor([owner is None for owner in owners])
    for layer in range(2):
        for site in FUSED_SITES:
            base = random_base(site, generator, dtype, has_bias=layer == 0)
            x = torch.randn(sum(counts), base.weight.shape[1], generator=generator).to(dtype)
            before = x.clone()
            y = delta.apply(layer, site, x, base)
            expected = fused_output(x, base.weight, base.bias, layer, site, owners)
            scale = max(1.0, float(expected.abs().max()))
            assert float((y.float() - expected).abs().max()) <= TOLERANCE[dtype] * scale * 2
            assert torch.equal(y[idle], base(x)[idle]), "rows without adapter must not be touched"
            assert torch.equal(x, before), "the input must be left as it is"

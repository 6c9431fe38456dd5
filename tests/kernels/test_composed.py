"""Compositions on the CPU path: the weighted sum of the adapters' own changes, beside single adapters and the base."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from adapter_kernels.composed import ComposedDelta, NotComposable, build_passes
from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.extras import AdapterExtras
from adapter_kernels.image import AdapterImage
from adapter_kernels.model_image import ModelTensors
from adapter_kernels.reference import fused_output
from adapter_kernels.route import Placement, build_route
from tests.kernels.cpu_steps import TOLERANCE, in_place_order, place, random_base
from tests.kernels.random_adapters import Ops, random_adapter
from tests.kernels.test_cpu_families import everywhere, one_of_each, s2ft

Weighted = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Share:
    """Rows of one sequence: a single adapter, none, or a composition of adapters by number."""

    count: int
    single: int | None = None
    composed: Weighted = ()


def adapters(dtype: torch.dtype) -> list[AdapterImage]:
    """One of each family, the ops that no slab packs included."""
    generator = torch.Generator().manual_seed(4)
    rare = {
        (0, "q_proj"): Ops((2,), csr=20),
        (0, "o_proj"): Ops(blockdiag=4),
        (1, "v_proj"): Ops(rot2_group=4, out_scale=True),
        (1, "down_proj"): Ops((1,), csr=30, is_ternary=True, bias=True),
    }
    dense = {(0, "gate_proj"): Ops(dense=True), (1, "o_proj"): Ops(dense=True, in_scale=True)}
    return [*one_of_each(dtype), random_adapter(rare, generator, dtype), random_adapter(dense, generator, dtype)]


def build(places: Sequence[Placement], plain: list[Share], composed: list[Share]) -> ComposedDelta:
    """Make the step's delta: the plain sequences in order, then the composed ones."""
    own = [None if seq.single is None else places[seq.single] for seq in plain]
    route = build_route([*own, *[None] * len(composed)], [seq.count for seq in (*plain, *composed)])
    compositions = [tuple((places[i], weight) for i, weight in seq.composed) for seq in composed]
    counts = [seq.count for seq in composed]
    passes = build_passes(compositions, counts, torch.zeros(sum(counts), dtype=torch.int64))
    return ComposedDelta(CpuDelta(route), sum(seq.count for seq in plain), passes, None)


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None, place_: tuple[int, str], images: list[AdapterImage], seq: Share
) -> Tensor:
    """Compute one sequence's rows slowly, in fp32: y + sum_i w_i (y_i - y)."""
    layer, site = place_
    base = fused_output(x, weight, bias, layer, site, [None] * x.shape[0])
    if not seq.composed:
        owner = None if seq.single is None else images[seq.single]
        return fused_output(x, weight, bias, layer, site, [owner] * x.shape[0])
    total = base.clone()
    for number, amount in seq.composed:
        total += amount * (fused_output(x, weight, bias, layer, site, [images[number]] * x.shape[0]) - base)
    return total


def check(images: list[AdapterImage], plain: list[Share], composed: list[Share], dtype: torch.dtype) -> None:
    """Run one step at every site of two layers and compare every sequence with the slow sum."""
    generator = torch.Generator().manual_seed(7)
    places = place(images, dtype)
    own = [None if seq.single is None else places[seq.single] for seq in plain]
    plain = [plain[i] for i in in_place_order(own, [seq.count for seq in plain])]
    delta = build(places, plain, composed)
    for layer in range(2):
        for site in FUSED_SITES:
            base = random_base(site, generator, dtype, has_bias=layer == 0)
            num_rows = sum(seq.count for seq in (*plain, *composed))
            x = torch.randn(num_rows, base.weight.shape[1], generator=generator).to(dtype)
            before = x.clone()
            y = delta.apply(layer, site, x, base)
            assert torch.equal(x, before), "the input must be left as it is"
            begin = 0
            for seq in (*plain, *composed):
                rows = slice(begin, begin := begin + seq.count)
                wanted = expected(x[rows], base.weight, base.bias, (layer, site), images, seq)
                scale = max(1.0, float(wanted.abs().max())) * 2 * max(1, len(seq.composed))
                assert float((y[rows].float() - wanted).abs().max()) <= TOLERANCE[dtype] * scale, (layer, site, seq)
                if seq.single is None and not seq.composed:
                    assert torch.equal(y[rows], base(x)[rows]), "rows without adapter keep the base's bits"


@pytest.mark.parametrize(
    ("num_composed", "dtype"),
    [(1, torch.float32), (2, torch.float32), (3, torch.float32), (4, torch.float32), (3, torch.bfloat16)],
)
def test_any_families_composed_are_the_weighted_sum_of_their_changes(num_composed: int, dtype: torch.dtype) -> None:
    images = adapters(dtype)
    rng = random.Random(num_composed)
    composed = [
        Share(count, None, tuple((i, rng.uniform(-2, 2)) for i in rng.sample(range(len(images)), num_composed)))
        for count in ((1, 17) if num_composed == 4 else (1, 1, 3))
    ]
    plain = [Share(2), Share(1, 0), Share(1, 6), Share(1, 9), Share(1, 10)]
    check(images, plain, composed, dtype)


def test_compositions_of_different_sizes_share_a_step() -> None:
    images = adapters(torch.float32)
    composed = [
        Share(1, None, ((0, 1.0),)),
        Share(2, None, ((6, -2.0), (7, 2.0), (3, 0.5))),
        Share(1, None, tuple((i, 0.5 * i - 1.75) for i in range(8))),
        Share(1, None, ((0, 1.0), (6, 1.0))),
    ]
    check(images, [Share(1), Share(1, 7)], composed[::-1], torch.float32)


def test_slices_of_disjoint_channels_add_exactly() -> None:
    first = random_adapter({(0, "up_proj"): Ops(rows=5)}, torch.Generator().manual_seed(1))
    second = random_adapter({(0, "up_proj"): Ops(rows=5)}, torch.Generator().manual_seed(2))
    own = [image.site(image.rows[0]).rows for image in (first, second)]
    assert own[0] is not None and own[1] is not None
    assert not set(own[0].idx.tolist()) & set(own[1].idx.tolist()), "choose other seeds"
    places = place([first, second], torch.float32)
    base = random_base("gate_up", torch.Generator().manual_seed(3), torch.float32)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(5))
    first_y, second_y, both_y = (
        build(places, [], [Share(1, None, own)]).apply(0, "gate_up", x, base)[0]
        for own in (((0, 1.0),), ((1, 1.0),), ((0, 1.0), (1, 1.0)))
    )
    changed = [40 + index for index in own[1].idx.tolist()]
    wanted = first_y.clone()
    wanted[changed] = second_y[changed]
    assert torch.equal(both_y, wanted) and not torch.equal(first_y, wanted)


def test_a_composed_row_gets_the_same_alone_and_beside_others() -> None:
    images = adapters(torch.float32)
    places = place(images, torch.float32)
    base = random_base("qkv", torch.Generator().manual_seed(3), torch.float32)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))
    mine = Share(1, None, ((2, 0.5), (6, -1.5), (8, 0.75)))
    alone = build(places, [Share(3)], [mine]).apply(0, "qkv", x, base)[3]
    others = [Share(1, None, ((3, 1.0), (0, 0.1), (7, 2.0), (1, -1.0))), Share(1, None, ((6, 1.0),))]
    beside = build(places, [Share(1)], [*others, mine]).apply(0, "qkv", x, base)[3]
    # a batched product may round otherwise than a plain one
    assert float((alone - beside).abs().max()) <= 1e-6 * float(alone.abs().max())


def test_a_broken_adapter_harms_the_rows_that_name_it_and_no_others() -> None:
    images = adapters(torch.float32)
    images[2].data.view(torch.float32).fill_(float("nan"))
    delta = build(
        place(images, torch.float32),
        [Share(1)],
        [Share(1, None, ((3, 1.0), (6, 0.5))), Share(1, None, ((2, 1.0), (3, 1.0)))],
    )
    base = random_base("o", torch.Generator().manual_seed(3), torch.float32)
    y = delta.apply(0, "o", torch.randn(3, 24, generator=torch.Generator().manual_seed(5)), base)
    assert torch.isfinite(y[:2]).all() and not torch.isfinite(y[2]).any()


def test_a_site_where_no_adapter_of_a_composition_acts_keeps_the_bits_of_the_base() -> None:
    images = [s2ft(5), random_adapter(everywhere(Ops((2,))), torch.Generator().manual_seed(1))]
    delta = build(place(images, torch.float32), [Share(1, 1)], [Share(2, None, ((0, 1.0),))])
    base = random_base("gate_up", torch.Generator().manual_seed(3), torch.float32)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    y = delta.apply(5, "gate_up", x, base)
    assert torch.equal(y, base(x))


def test_an_adapter_with_a_prompt_is_no_part_of_a_composition() -> None:
    (placed,) = place([s2ft(5)], torch.float32)
    prompt = ModelTensors(prompt_embeds=torch.zeros(3, 16))
    placed = replace(placed, extras=AdapterExtras({}, prompt))
    with pytest.raises(NotComposable, match="prompt of 3 virtual tokens"):
        build_passes([((placed, 0.5),)], [1], torch.zeros(1, dtype=torch.int64))

"""Sparse slices, mixtures and scales on the CPU path against reference.py, alone and in one step with LoRA and base."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.image import AdapterImage, ImageError
from adapter_kernels.route import build_route
from tests.kernels.cpu_steps import Base, check_step, place, random_base
from tests.kernels.random_adapters import ALL_SITES, SHAPES, Ops, Place, random_adapter, random_image, uniform_ranks

DTYPES = [torch.float32, torch.bfloat16]
# decodes that form groups, even and padded, beside chunks of their own
STEPS = {
    "decodes": [1, 1, 1, 1, 1, 1],
    "padded": [1, 3, 1, 2, 5, 1],
    "chunks": [20, 1, 33, 1, 17, 2],
}
CHOSEN: list[int | None] = [0, 1, 2, None, 1, 0]


def everywhere(ops: Ops) -> dict[Place, Ops]:
    return {(layer, site): ops for layer in range(2) for site in ALL_SITES}


def s2ft(seed: int, dtype: torch.dtype = torch.float32, *, is_ragged: bool = True) -> AdapterImage:
    """Slices as S2FT selects them, other numbers in each layer, none of some sites."""
    rng = random.Random(seed if is_ragged else 0)
    ops = {}
    for layer in range(2):
        for site in ("o_proj", "down_proj"):
            ops[layer, site] = Ops(cols=rng.choice([0, 1, 5, SHAPES[site][1]]))
        for site in ("v_proj", "up_proj"):
            ops[layer, site] = Ops(rows=rng.choice([0, 1, 3, SHAPES[site][0]]))
    kept = {key: own for key, own in ops.items() if own.cols or own.rows}
    return random_adapter(kept, torch.Generator().manual_seed(seed), dtype)


def meteora(
    seed: int, ranks: tuple[int, ...], top_k: int, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> AdapterImage:
    ops = everywhere(Ops(ranks, top_k=top_k, temperature=temperature))
    return random_adapter(ops, torch.Generator().manual_seed(seed), dtype)


def one_of_each(dtype: torch.dtype) -> list[AdapterImage]:
    """Two mixtures, two LoRAs, two S2FTs, a DoRA, an IA3, and one adapter that does everything somewhere."""
    generator = torch.Generator().manual_seed(1)
    ia3 = {(0, "k_proj"): Ops(out_scale=True), (1, "down_proj"): Ops(in_scale=True, bias=True)}
    everything = {
        (0, "q_proj"): Ops((2, 3), top_k=1, cols=2, bias=True),
        (0, "k_proj"): Ops((3,), rows=2, in_scale=True),
        (0, "v_proj"): Ops(cols=1, rows=8, in_scale=True, out_scale=True),
        (1, "o_proj"): Ops((1, 2, 3), top_k=2, rows=3, cols=3, out_scale=True, in_scale=True, bias=True),
        (1, "up_proj"): Ops((2,) * 12, top_k=2, out_scale=True),
    }
    return [
        meteora(2, (2,) * 9, 2, dtype=dtype),
        meteora(3, (1, 4, 2, 8), 2, 0.3, dtype),
        random_image(uniform_ranks(4), generator, dtype),
        random_image(uniform_ranks(8), generator, dtype),
        s2ft(5, dtype),
        s2ft(6, dtype),
        random_adapter(everywhere(Ops((2,), out_scale=True)), generator, dtype),
        random_adapter(ia3, generator, dtype),
        random_adapter(everything, generator, dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_ragged", [True, False], ids=["ragged", "one size"])
def test_sparse_slices_match_the_reference(step: str, dtype: torch.dtype, is_ragged: bool) -> None:
    check_step([s2ft(seed, dtype, is_ragged=is_ragged) for seed in range(3)], CHOSEN, STEPS[step], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ranks", [(2,) * 9, (1, 4, 2, 8, 3, 1)], ids=["equal", "unequal"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_mixtures_match_the_reference(top_k: int, ranks: tuple[int, ...], step: str, dtype: torch.dtype) -> None:
    images = [meteora(seed, ranks, top_k, 0.5, dtype) for seed in range(2)] + [meteora(9, ranks[:4], 2, 3.0, dtype)]
    check_step(images, CHOSEN, STEPS[step], dtype)


def test_groups_that_begin_in_the_middle_of_a_slab_match_the_reference() -> None:
    images = [meteora(seed, (2,) * 9, 2) for seed in range(6)]
    check_step(images, [2, 3, None, 5], [1, 1, 1, 1], torch.float32)
    check_step(images, [1, 4, 4], [2, 1, 20], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_scales_match_the_reference(step: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    ops = [Ops(in_scale=True), Ops((2,), out_scale=True), Ops(in_scale=True, out_scale=True, bias=True)]
    images = [random_adapter(everywhere(own), generator, dtype) for own in ops]
    check_step([*images, random_adapter(everywhere(ops[2]), generator, dtype)], CHOSEN, STEPS[step], dtype)
    check_step(images[1:2], [0, None, 0, 0], [1, 1, 1, 1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_families_in_one_step_match_the_reference(dtype: torch.dtype) -> None:
    rng = random.Random(1)
    images = one_of_each(dtype)
    chosen = [rng.choice([None, *range(len(images))]) for _ in range(40)]
    check_step(images, chosen, [rng.choice([1, 1, 1, 2, 19]) for _ in chosen], dtype)


def test_a_row_beside_all_families_has_the_result_it_has_alone() -> None:
    images = one_of_each(torch.float32)
    places = place(images, torch.float32)
    order = sorted(range(len(images)), key=lambda i: (places[i].slab_id, places[i].position))
    together = CpuDelta(build_route([places[i] for i in order], [1] * len(order)))
    generator = torch.Generator().manual_seed(2)
    for layer in range(2):
        for site in FUSED_SITES:
            base = random_base(site, generator, torch.float32)
            x = torch.randn(len(order), base.weight.shape[1], generator=generator)
            mixed = together.apply(layer, site, x, base)
            for row, i in enumerate(order):
                alone = CpuDelta(build_route([places[i]], [1])).apply(layer, site, x[row : row + 1], base)
                assert torch.allclose(mixed[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["row", "weights"])
def test_what_is_not_finite_stays_with_its_own_row(what: str) -> None:
    images = one_of_each(torch.float32)
    # twins, so that each poisoned adapter has a neighbour in its slab
    places = place([*images, *images], torch.float32)
    order = sorted(range(len(places)), key=lambda i: (places[i].slab_id, places[i].position))
    generator = torch.Generator().manual_seed(2)
    delta = CpuDelta(build_route([places[i] for i in order], [1] * len(order)))
    lost = torch.tensor([i >= len(images) for i in order])
    inputs = {}
    for layer in range(2):
        for site in FUSED_SITES:
            base = random_base(site, generator, torch.float32)
            x = torch.randn(len(order), base.weight.shape[1], generator=generator)
            inputs[layer, site] = (x, base, delta.apply(layer, site, x, base))
    if what == "weights":
        for i in range(len(images), len(places)):
            for _, _, tensor in places[i].slab.tensors():
                if tensor.is_floating_point():
                    tensor[places[i].position] = float("nan")
    for (layer, site), (x, base, clean) in inputs.items():
        if what == "row":
            x[lost] = float("nan")
        poisoned = delta.apply(layer, site, x, base)
        assert torch.equal(poisoned[~lost], clean[~lost])
        if what == "row":
            assert poisoned[lost].isnan().all()


class Silent(Base):
    """A base that says nothing, whatever it hears."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], self.weight.shape[0])


def test_slices_of_nearly_one_size_share_a_slab_and_read_no_other_channel() -> None:
    images = [
        random_adapter({(0, "down_proj"): Ops(cols=count)}, torch.Generator().manual_seed(count)) for count in (5, 2)
    ]
    places = place(images, torch.float32)
    assert places[0].slab is places[1].slab
    selected = images[1].site(images[1].rows[0]).cols
    assert selected is not None
    delta, silent = CpuDelta(build_route([places[1]], [1])), Silent(torch.empty(16, 40), None)
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(5))
    clean = delta.apply(0, "down", x, silent)
    x[0, [i for i in range(40) if i not in selected.idx.tolist()]] = float("nan")
    assert torch.equal(delta.apply(0, "down", x, silent), clean)


@pytest.mark.parametrize("idx", [[3, 3], [5, 2], [-1, 0], [0, 40]], ids=["twice", "falling", "negative", "beyond"])
def test_channels_that_a_step_could_not_read_are_refused_at_load(idx: list[int]) -> None:
    image = random_adapter({(0, "down_proj"): Ops(cols=2)}, torch.Generator().manual_seed(1))
    cols = image.rows[0].cols
    assert cols is not None
    image.data[cols.idx_offset : cols.idx_offset + 8].view(torch.int32)[:] = torch.tensor(idx)
    with pytest.raises(ImageError, match="not increasing below 40"):
        image.site(image.rows[0])


@pytest.mark.parametrize(
    "changes", [{"top_k": 4}, {"top_k": 0}, {"temperature": 0.0}, {"temperature": math.nan}, {"gate_offset": None}]
)
def test_a_gate_that_cannot_choose_is_refused_at_load(changes: dict[str, Any]) -> None:
    image = random_adapter({(0, "q_proj"): Ops((1, 2, 1), top_k=2)}, torch.Generator().manual_seed(1))
    with pytest.raises(ImageError, match="layer 0, q_proj"):
        image.site(replace(image.rows[0], **changes))

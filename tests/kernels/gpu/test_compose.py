"""Compositions on the device path, under the interpreter, against the slow sum: the site as serving launches it."""

import random
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.acting_sites import ActingSites
from adapter_kernels.gpu.composed_rows import Weighted, spread
from adapter_kernels.gpu.launch_config import LaunchConfigs
from adapter_kernels.gpu.step import DeviceStep, StepComposition, Workspace
from adapter_kernels.reference_composed import composed_output
from serve.model.composed_site import ComposedSite
from serve.model.fused_step import FusedStep
from serve.model.weight_source import SiteWeights
from tests.kernels.gpu.batches import batch_of
from tests.kernels.gpu.composed_cases import parts_of
from tests.kernels.gpu.family_cases import CAPACITY, FamilySite, family_images, family_ops
from tests.kernels.gpu.test_families import NUM_FAMILIES, TOLERANCE, _break
from tests.model.fused_run import poisoned_memory

NAMES = list(family_ops())
LORA, S2FT, METEORA, DORA, IA3, EVERYTHING = map(NAMES.index, ("lora", "s2ft", "meteora", "dora", "ia3", "everything"))
# of one adapter with a weight to four of different families; weights of zero and below
COMPOSITIONS: tuple[Weighted, ...] = (
    ((LORA, -1.5),),
    ((S2FT, 0.75), (LORA, 1.25)),
    ((METEORA, 0.5), (DORA, -0.75), (IA3, 2.0)),
    ((EVERYTHING, 1.0), (LORA, 0.0), (DORA, -0.25), (S2FT, 1.5)),
)


def composed_site(site: FamilySite, rows: list[Weighted], *, max_pairs: int = 512) -> Tensor:
    """Launch a site in whose rows these compositions act, on memory full of NaN."""
    max_rows, dtype = max(max_pairs, len(rows)), site.x.dtype
    with poisoned_memory():
        workspace = Workspace.build(
            max_rows=max_rows,
            max_splits=1,
            max_members=3,
            rank_capacity=CAPACITY,
            hidden_size=1,
            max_pairs=max_pairs,
            max_in_width=site.x.shape[1],
            dtype=dtype,
            device=site.x.device,
        )
        slots = {slot for own in rows for slot, _ in own}
        sites = ActingSites.union(ActingSites.of(site.images[slot].rows) for slot in slots)
        composition = StepComposition(site.tables, sites, workspace, parts_of(rows, max_pairs))
        none = torch.empty(0)
        inputs = DeviceStep(len(rows), none, none, none, None, None, None, composition)
        step = cast(FusedStep, Step(inputs))
        y = functional.linear(site.x, site.weight, site.bias)
        ComposedSite(SiteWeights(site.weight, site.bias), 0, site.name, site.widths, 1).add(site.x, y, step)
    return y


class Step:
    """The part of a `FusedStep` that compositions read."""

    def __init__(self, inputs: DeviceStep) -> None:
        self.inputs = inputs
        self.configs = LaunchConfigs({})


def build(name: str, num_rows: int, dtype: torch.dtype, *, has_bias: bool = True) -> FamilySite:
    return FamilySite.build(name, batch_of([None] * num_rows), dtype, has_bias=has_bias)


def check(site: FamilySite, rows: list[Weighted], *, max_pairs: int = 512) -> None:
    out = composed_site(site, rows, max_pairs=max_pairs)
    adapters = [[(site.images[slot], weight) for slot, weight in own] for own in rows]
    wanted = composed_output(site.x, site.weight, site.bias, 0, site.name, adapters)
    error = float((out.float() - wanted).abs().max())
    assert error <= TOLERANCE[out.dtype] * max(1.0, float(wanted.abs().max())), error
    plain = torch.tensor([not own for own in rows])
    assert torch.equal(out[plain], functional.linear(site.x, site.weight, site.bias)[plain]), "the base's bits"


def mixed_rows(num_rows: int, seed: int) -> list[Weighted]:
    """Rows without composition among rows of all of them, in no order."""
    rng = random.Random(seed)
    rows = [rng.choice((*COMPOSITIONS, ())) for _ in range(num_rows)]
    rows[: len(COMPOSITIONS) + 1] = [*COMPOSITIONS, ()][:num_rows]
    return rows


# each pair for itself, in blocks of 16, in several parts
@pytest.mark.parametrize(
    ("name", "num_rows", "dtype", "max_pairs"),
    [("down", 5, torch.float32, 512), ("qkv", 12, torch.float16, 512), ("gate_up", 8, torch.float32, 7)],
)
def test_a_row_gets_the_weighted_sum_of_its_adapters(
    name: str, num_rows: int, dtype: torch.dtype, max_pairs: int
) -> None:
    site = build(name, num_rows, dtype, has_bias=name == "qkv")
    check(site, mixed_rows(num_rows, num_rows), max_pairs=max_pairs)


def test_many_rows_of_few_compositions() -> None:
    # more than 256 pairs: blocks of 64 rows
    check(build("o", 140, torch.float16), [COMPOSITIONS[1]] * 70 + [COMPOSITIONS[0], COMPOSITIONS[2]] * 35)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 5, 17, 63, 133])
def test_every_site_at_every_size(num_rows: int, dtype: torch.dtype) -> None:
    for name in FUSED_SITES:
        for max_pairs in (8, 64, 1024):
            check(build(name, num_rows, dtype), mixed_rows(num_rows, num_rows), max_pairs=max_pairs)


def test_disjoint_slices_add_up_exactly() -> None:
    # whole numbers: every sum and product is exact
    site = build("down", 3, torch.float32, has_bias=False)
    for image in site.images[S2FT : S2FT + 1]:
        for own_rows in image.rows:
            own = image.site(own_rows)
            for sparse in (own.cols, own.rows):
                if sparse is not None:
                    sparse.d.copy_(torch.arange(sparse.d.numel()).view_as(sparse.d) % 7 - 3)
    site = replace(
        FamilySite.build("down", site.batch, torch.float32, has_bias=False, images=site.images),
        x=site.x.round(),
        weight=(4 * site.weight).round(),
    )
    rows: list[Weighted] = [((S2FT, 1.0),), ((S2FT, -2.0),), ()]
    adapters = [[(site.images[slot], weight) for slot, weight in own] for own in rows]
    wanted = composed_output(site.x, site.weight, None, 0, "down", adapters)
    assert torch.equal(composed_site(site, rows), wanted) and not torch.equal(wanted[0], wanted[2])


def test_a_row_gets_the_same_bits_in_any_company() -> None:
    site = build("down", 3, torch.float32)
    own, other = COMPOSITIONS[3], COMPOSITIONS[2]
    together = composed_site(site, [own, other, ((LORA, 0.5),)])
    assert torch.equal(composed_site(site, [own, (), ()])[0], together[0])


# numpy, under the interpreter, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("num_rows", [5, 12])
def test_a_broken_adapter_harms_the_rows_that_name_it_alone(num_rows: int) -> None:
    images = [*family_images(), *family_images()]
    for image in images[NUM_FAMILIES:]:
        for own_rows in image.rows:
            _break(image, own_rows)
    whole = mixed_rows(num_rows, 3)
    broken = [
        tuple((slot + NUM_FAMILIES * (i == len(own) - 1), weight) for i, (slot, weight) in enumerate(own))
        if index % 3 == 1
        else own
        for index, own in enumerate(whole)
    ]
    lost = torch.tensor([own != before for own, before in zip(broken, whole, strict=True)])
    site = FamilySite.build("o", batch_of([None] * num_rows), torch.float32, images=images)
    out = composed_site(site, broken)
    assert torch.equal(out[~lost], composed_site(site, whole)[~lost])
    acts = [any(rows.site == "o_proj" for rows in images[own[-1][0]].rows) for own in broken if own]
    assert out[lost].isnan().any(dim=1).tolist() == [
        act for act, own, before in zip(acts, filter(None, broken), filter(None, whole), strict=True) if own != before
    ]


def test_pairs_of_a_row_are_never_parted_and_groups_are_whole_compositions() -> None:
    rng = random.Random(5)
    for max_pairs in (4, 9, 64, 300):
        rows, begin = [], 0
        for _ in range(20):
            count = rng.choice((1, 1, 3, 30))
            rows.append((begin, count, rng.choice(COMPOSITIONS)))
            begin += count + rng.randrange(2)
        found: dict[int, list[tuple[int, float]]] = {}
        for part in spread(rows, max_pairs):
            assert len(part.row_of) <= max_pairs
            own: dict[int, list[tuple[int, float]]] = {}
            for first, length, stride, count in part.blocks.tolist():
                for pair in (first + turn * stride + lane for lane in range(length) for turn in range(count)):
                    own.setdefault(int(part.row_of[pair]), []).append(
                        (int(part.slots[pair]), float(part.weights[pair]))
                    )
            assert not own.keys() & found.keys()
            found |= own
            assert_grouped(part.slots, part.perm, part.block_slot, part.block_start, part.block_len)
        assert found == {row: list(own) for first, count, own in rows for row in range(first, first + count)}


def assert_grouped(slots: np.ndarray, perm: np.ndarray, own: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
    if len(slots) <= 16:
        assert len(perm) == 0, "few pairs are not grouped"
        return
    seen = [
        (int(pair), slot)
        for slot, begin, count in zip(own.tolist(), start.tolist(), length.tolist(), strict=True)
        for pair in perm[begin : begin + count]
    ]
    assert sorted(seen) == list(enumerate(slots.tolist()))

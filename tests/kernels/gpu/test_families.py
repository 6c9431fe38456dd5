"""Mixtures, slices and scales on the device path, under the interpreter, against reference.py: all in one batch."""

import pytest
import torch
from torch import Tensor

from adapter_kernels import reference
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.acting_sites import fused_site_of
from adapter_kernels.gpu.add_norm import add_norm
from adapter_kernels.gpu.expand import expand
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.qkv_sink import qkv_sink
from adapter_kernels.gpu.sink_inputs import DeltaInput, QkvDims
from adapter_kernels.gpu.swiglu_sink import swiglu_sink
from adapter_kernels.image import AdapterImage, SiteRows
from adapter_kernels.reference_sinks import swiglu_sink as reference_swiglu
from tests.kernels.gpu.batches import Batch, batch_of, random_batch
from tests.kernels.gpu.family_cases import FamilySite, family_images, family_ops
from tests.kernels.random_adapters import SHAPES

NUM_FAMILIES = len(family_ops())
EXPAND = LaunchConfig(block_o=32, block_r=16)
# relative to the largest value; fp16 rounds the base's product, the bridge and the sum
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}
# rows, dtype, planes, form of the route: each ragged size, each form
STEPS = [(7, torch.float32, 2, 1), (7, torch.float16, 1, 1), (17, torch.float32, 2, 16), (63, torch.float16, 1, 64)]


def expected(site: FamilySite) -> Tensor:
    """The definition, in fp32."""
    return reference.fused_output(site.x, site.weight, site.bias, 0, site.name, site.owners)


def assert_close(out: Tensor, wanted: Tensor) -> None:
    error = float((out.float() - wanted).abs().max())
    assert error <= TOLERANCE[out.dtype] * max(1.0, float(wanted.abs().max())), error


def every_family(num_rows: int) -> Batch:
    """A batch in which each family, and no adapter, has at least one row if there are so many."""
    drawn = random_batch(num_rows, NUM_FAMILIES, "uniform", seed=num_rows).slots.tolist()
    slots: list[int | None] = [None if slot < 0 else slot for slot in drawn]
    slots[: NUM_FAMILIES + 1] = [*range(NUM_FAMILIES), None][:num_rows]
    return batch_of(slots)


def whole_output(site: FamilySite, splits: int, block_rows: int) -> Tensor:
    """Launch a site the way around: everything added into y."""
    adapters = site.shrunk(splits=splits, block_rows=block_rows)
    y, families = site.base(), adapters.families
    first, route = adapters.first_site, adapters.route
    expand(
        adapters.bridge, site.tables, first, site.widths, route, y, accumulate=True, families=families, config=EXPAND
    )
    return y


def check_whole_output(name: str, num_rows: int, dtype: torch.dtype, splits: int, block_rows: int) -> None:
    site = FamilySite.build(name, every_family(num_rows), dtype, has_bias=name == "qkv")
    assert_close(whole_output(site, splits, block_rows), expected(site))


@pytest.mark.parametrize("num_rows, dtype, splits, block_rows", STEPS)
def test_all_families_in_one_batch_added_into_y(
    num_rows: int, dtype: torch.dtype, splits: int, block_rows: int
) -> None:
    check_whole_output("qkv" if block_rows == 16 else "down", num_rows, dtype, splits, block_rows)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows, dtype, splits, block_rows", [*STEPS, (133, torch.float32, 8, 16)])
def test_every_site_in_every_form(num_rows: int, dtype: torch.dtype, splits: int, block_rows: int) -> None:
    for name in FUSED_SITES:
        check_whole_output(name, num_rows, dtype, splits, block_rows)


@pytest.mark.parametrize("num_rows, dtype, splits, block_rows", STEPS[1:3])
def test_the_qkv_sink_serves_all_families(num_rows: int, dtype: torch.dtype, splits: int, block_rows: int) -> None:
    site = FamilySite.build("qkv", every_family(num_rows), dtype)
    q = torch.full((num_rows, 3, 8), torch.nan, dtype=dtype)
    k, v = (torch.full((num_rows, 1, 1, 8), torch.nan, dtype=dtype) for _ in range(2))
    qkv_sink(
        site.base(),
        site.shrunk(splits=splits, block_rows=block_rows),
        q_out=q,
        k_cache=k,
        v_cache=v,
        slot_mapping=torch.arange(num_rows, dtype=torch.int32),
        cos=None,
        sin=None,
        norm=None,
        dims=QkvDims(3, 1, 8),
    )
    assert_close(torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), dim=1), expected(site))


@pytest.mark.parametrize("num_rows, dtype, splits, block_rows", [STEPS[0], STEPS[3]])
def test_the_swiglu_sink_serves_all_families(num_rows: int, dtype: torch.dtype, splits: int, block_rows: int) -> None:
    site = FamilySite.build("gate_up", every_family(num_rows), dtype, has_bias=False)
    out = torch.full((num_rows, SHAPES["gate_proj"][0]), torch.nan, dtype=dtype)
    swiglu_sink(site.base(), site.shrunk(splits=splits, block_rows=block_rows), activation="silu", out=out)
    assert_close(out, reference_swiglu(expected(site), None, "silu"))


@pytest.mark.parametrize("num_rows, dtype, splits, block_rows", STEPS[2:3])
def test_add_norm_scales_the_block_and_adds_its_delta(
    num_rows: int, dtype: torch.dtype, splits: int, block_rows: int
) -> None:
    site = FamilySite.build("o", every_family(num_rows), dtype)
    adapters = site.shrunk(splits=splits, block_rows=block_rows)
    delta = torch.full((num_rows, 16), torch.nan, dtype=dtype)
    bridge, first, route, families = adapters.bridge, adapters.first_site, adapters.route, adapters.families
    expand(bridge, site.tables, first, site.widths, route, delta, accumulate=False, families=families, config=EXPAND)
    x = torch.zeros(num_rows, 16, dtype=dtype)
    buffer = DeltaInput(delta, site.tables, site.batch.slots, first, families)
    add_norm(x, site.base(), delta=buffer, x_out=x)
    assert_close(x, expected(site))


def test_equal_logits_choose_the_lower_expert() -> None:
    images = family_images()
    # whole numbers, so that equal gate rows give equal logits in any order of the sum: one of two, then of all others
    generator = torch.Generator().manual_seed(1)
    for image in images[:2]:
        for rows in image.rows:
            gate = image.site(rows).gate
            assert gate is not None
            gate.weight[:] = torch.randint(-3, 4, (1, gate.weight.shape[1]), generator=generator)
            gate.weight[[1, 3]] *= 2
    site = FamilySite.build("qkv", batch_of([0, 1, 0]), torch.float32, images=images)
    site.x.round_()
    assert_close(whole_output(site, 1, 16), expected(site))


# numpy, under the interpreter, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
@pytest.mark.parametrize(("what", "block_rows"), [("weights", 16), ("row", 1)])
def test_what_is_not_finite_stays_with_its_own_rows(what: str, block_rows: int) -> None:
    # each adapter has a broken twin, or a broken row, beside it
    images = [*family_images(), *family_images()]
    for image in images[NUM_FAMILIES:] if what == "weights" else []:
        for rows in image.rows:
            _break(image, rows)
    twins = [slot + NUM_FAMILIES * (what == "weights") for slot in range(NUM_FAMILIES)]
    slots = [*range(NUM_FAMILIES), None, *twins]
    lost = torch.arange(len(slots)) > NUM_FAMILIES
    for name in ("qkv", "down"):
        alone = FamilySite.build(name, batch_of([*slots[: NUM_FAMILIES + 1], *[None] * NUM_FAMILIES]), torch.float32)
        site = FamilySite.build(name, batch_of(slots), torch.float32, images=images)
        if what == "row":
            site.x[lost] = torch.nan
        out = whole_output(site, 1, block_rows)
        assert torch.equal(out[~lost], whole_output(alone, 1, block_rows)[~lost])
        acts = [any(fused_site_of(rows.site) == name for rows in images[twin].rows) for twin in twins]
        assert out[lost].isnan().any(dim=1).tolist() == (acts if what == "weights" else [True] * NUM_FAMILIES)


def _break(image: AdapterImage, rows: SiteRows) -> None:
    site = image.site(rows)
    sparse = [own.d for own in (site.cols, site.rows) if own is not None]
    gates = [] if site.gate is None else [site.gate.weight]
    vectors = [vector for vector in (site.bias, site.out_scale, site.in_scale) if vector is not None]
    for tensor in (site.a, site.bt, *sparse, *gates, *vectors):
        tensor.fill_(torch.nan)

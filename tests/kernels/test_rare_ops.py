"""Sparse and dense changes, turned inputs and outputs: against the definition, in mixed steps, and broken."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.extras import Frame, Rotation, Sparse2d
from adapter_kernels.gate_options import METEORA, GateOptions
from adapter_kernels.image import AdapterImage, ImageError
from adapter_kernels.profile import SiteProfile
from adapter_kernels.rare_image import read_rare, read_rare_sites
from adapter_kernels.rare_ops import sparse_product
from adapter_kernels.reference import fused_output
from adapter_kernels.reference_rare import sparse_delta, turned_inputs, turned_outputs
from adapter_kernels.route import build_route
from tests.kernels.cpu_steps import check_step, place, random_base
from tests.kernels.random_adapters import ALL_SITES, SHAPES, Ops, Place, random_adapter
from tests.kernels.test_cpu_families import CHOSEN, DTYPES, STEPS, one_of_each

ALONE = {
    "csr": Ops(csr=9),
    "ternary": Ops(csr=11, is_ternary=True),
    "dense": Ops(dense=True),
    "blocks": Ops(blockdiag=4),
    "pairs": Ops(rot2_group=8),
    "scaled blocks": Ops(blockdiag=8, in_scale=True, out_scale=True),
    "scaled pairs": Ops(rot2_group=2, in_scale=True, out_scale=True, bias=True),
}
EVERYTHING = Ops(
    (2, 3),
    top_k=1,
    cols=2,
    rows=3,
    bias=True,
    out_scale=True,
    in_scale=True,
    csr=12,
    dense=True,
    blockdiag=2,
    rot2_group=4,
)


def everywhere(ops: Ops, seed: int, dtype: torch.dtype = torch.float32) -> AdapterImage:
    places: dict[Place, Ops] = {(layer, site): ops for layer in range(2) for site in ALL_SITES}
    return random_adapter(places, torch.Generator().manual_seed(seed), dtype)


def rare_families(dtype: torch.dtype) -> list[AdapterImage]:
    """Every op alone, all of them in one adapter, and one that acts here and there."""
    images = [everywhere(ops, seed, dtype) for seed, ops in enumerate(ALONE.values())]
    scattered: dict[Place, Ops] = {
        (0, "k_proj"): Ops(blockdiag=2, csr=3),
        (0, "v_proj"): Ops(rot2_group=8),
        (1, "gate_proj"): Ops((3,), dense=True),
    }
    mixed = random_adapter(scattered, torch.Generator().manual_seed(9), dtype)
    return [*images, everywhere(EVERYTHING, 8, dtype), mixed]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ALONE)
def test_each_op_alone_matches_the_reference(op: str, dtype: torch.dtype) -> None:
    images = [everywhere(ALONE[op], seed, dtype) for seed in range(3)]
    check_step(images, CHOSEN, STEPS["padded"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_ops_in_one_adapter_match_the_reference(dtype: torch.dtype) -> None:
    check_step([everywhere(EVERYTHING, seed, dtype) for seed in range(3)], CHOSEN, STEPS["padded"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_families_in_one_step_match_the_reference(dtype: torch.dtype) -> None:
    rng = random.Random(2)
    images = [*one_of_each(dtype), *rare_families(dtype)]
    chosen = [rng.choice([None, *range(len(images))]) for _ in range(40)]
    check_step(images, chosen, [rng.choice([1, 1, 1, 2, 19]) for _ in chosen], dtype)


def test_a_row_beside_all_families_has_the_result_it_has_alone() -> None:
    places = place([*one_of_each(torch.float32), *rare_families(torch.float32)], torch.float32)
    order = sorted(range(len(places)), key=lambda i: (places[i].slab_id, places[i].position))
    together = CpuDelta(build_route([places[i] for i in order], [1] * len(order)))
    generator = torch.Generator().manual_seed(2)
    for layer in range(2):
        for site in FUSED_SITES:
            base = random_base(site, generator, torch.float32)
            x = torch.randn(len(order), base.weight.shape[1], generator=generator)
            mixed = together.apply(layer, site, x, base)
            for row, i in enumerate(order):
                alone = CpuDelta(build_route([places[i]], [1])).apply(layer, site, x[row : row + 1], base)
                assert torch.allclose(mixed[row], alone[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["row", "weights"])
def test_what_is_not_finite_stays_with_its_own_row(what: str, value: float) -> None:
    images = rare_families(torch.float32)
    places = place([*images, *images], torch.float32)
    order = sorted(range(len(places)), key=lambda i: (places[i].slab_id, places[i].position))
    generator = torch.Generator().manual_seed(2)
    delta = CpuDelta(build_route([None, *(places[i] for i in order)], [1] * (len(order) + 1)))
    lost = torch.tensor([False, *(i >= len(images) for i in order)])
    inputs = {}
    for layer in range(2):
        for site in FUSED_SITES:
            base = random_base(site, generator, torch.float32)
            x = torch.randn(len(lost), base.weight.shape[1], generator=generator)
            inputs[layer, site] = (x, base, delta.apply(layer, site, x, base))
    if what == "weights":
        for broken in places[len(images) :]:
            assert broken.extras is not None
            for rare in broken.extras.sites.values():
                for tensor in rare.tensors():
                    if tensor.is_floating_point():
                        tensor.fill_(value)
    for (layer, site), (x, base, clean) in inputs.items():
        if what == "row":
            x[lost] = value
        poisoned = delta.apply(layer, site, x, base)
        assert torch.equal(poisoned[~lost], clean[~lost])
        assert torch.equal(poisoned[:1], base(x)[:1])
        if what == "row":
            assert not poisoned[lost].isfinite().all(dim=1).any()


def test_the_definition_equals_plain_matrices() -> None:
    generator = torch.Generator().manual_seed(1)
    x, u = torch.randn(5, 12, generator=generator), torch.randn(5, 12, generator=generator)
    weight = torch.randn(8, 12, generator=generator) * (torch.rand(8, 12, generator=generator) < 0.3)
    rows, col = weight.nonzero(as_tuple=True)
    indptr = torch.cat((torch.zeros(1), torch.bincount(rows, minlength=8).cumsum(0))).int()
    matrix = Sparse2d(indptr, col.int(), weight[rows, col])
    assert torch.allclose(sparse_delta(x, matrix), x @ weight.T, atol=1e-6)
    assert torch.allclose(sparse_product(x, matrix), x @ weight.T, atol=1e-6)
    blocks = torch.randn(3, 4, 4, generator=generator)
    expected = torch.cat([x[:, 4 * k : 4 * k + 4] @ blocks[k] for k in range(3)], dim=1)
    assert torch.allclose(turned_inputs(x, blocks), expected, atol=1e-6)
    # pairs (0, 2), (1, 3) of each group of 4: [c0 -c1; c1 c0] as a matrix
    c0, c1 = torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    matrix_of_pairs = torch.diag(c0)
    for group in range(0, 12, 4):
        for i in (group, group + 1):
            matrix_of_pairs[i, i + 2], matrix_of_pairs[i + 2, i] = -c1[i], c1[i + 2]
    assert torch.allclose(turned_outputs(u, Rotation(4, c0, c1)), u @ matrix_of_pairs.T, atol=1e-6)


def test_a_sparse_products_bits_do_not_depend_on_the_rows_beside_it() -> None:
    image = random_adapter({(0, "down_proj"): Ops(csr=200)}, torch.Generator().manual_seed(1))
    rare = read_rare(image, image.rows[0], torch.float32)
    assert rare is not None and rare.csr is not None
    x = torch.randn(33, 40, generator=torch.Generator().manual_seed(2))
    together = sparse_product(x, rare.csr)
    for first, last in ((0, 1), (5, 7), (9, 17), (32, 33)):
        assert torch.equal(sparse_product(x[first:last], rare.csr), together[first:last])


def test_signs_are_read_lowest_bit_first() -> None:
    image = random_adapter({(0, "q_proj"): Ops(csr=11, is_ternary=True)}, torch.Generator().manual_seed(1))
    rows = image.rows[0].csr
    assert rows is not None
    image.data[rows.val_offset : rows.val_offset + 2] = torch.tensor([0b00000101, 0b00000100], dtype=torch.uint8)
    rare = read_rare(image, image.rows[0], torch.bfloat16)
    assert rare is not None and rare.csr is not None
    assert rare.csr.val.tolist() == [-0.75, 0.75, -0.75, *[0.75] * 7, -0.75]


def test_a_framed_site_keeps_its_scales_out_of_the_slab_and_others_share_one() -> None:
    framed = random_adapter({(0, "q_proj"): Ops(blockdiag=4, in_scale=True)}, torch.Generator().manual_seed(1))
    rare = read_rare_sites(framed, torch.float32)[0, "q_proj"]
    assert isinstance(rare.frame, Frame) and rare.frame.in_scale is not None
    (placed,) = place([framed], torch.float32)
    assert placed.slab.bytes_per_position == 0 and not placed.slab.has_scales
    plain = random_adapter({(0, "q_proj"): Ops((2,), in_scale=True)}, torch.Generator().manual_seed(1))
    assert read_rare_sites(plain, torch.float32) == {}


def test_experts_of_an_mlps_gate_are_read_beside_the_slab_and_left_to_it() -> None:
    followed = GateOptions(group="layers.0.mlp")
    ops = {(0, "up_proj"): Ops((2, 3), cols=2, csr=4, gate=followed), (0, "down_proj"): Ops((1, 1), gate=followed)}
    image = random_adapter(ops, torch.Generator().manual_seed(1))
    rare = read_rare_sites(image, torch.bfloat16)
    experts = rare[0, "up_proj"].experts
    assert experts is not None and (experts.gate, experts.ranks) == ("layers.0.mlp", (2, 3))
    stored = image.view(image.rows[0].a_offset, 5, 16), image.view(image.rows[0].bt_offset, 5, 40)
    assert torch.equal(experts.a, stored[0].bfloat16()) and torch.equal(experts.bt, stored[1].bfloat16())
    assert (rare[0, "up_proj"].out_begin, rare[0, "up_proj"].out_end) == (40, 80)
    (placed,) = place([image], torch.float32)
    assert placed.slab.profile.sites == (SiteProfile(0, "up_proj", num_cols=16),)
    # without the MLP nobody weighs them: the site's other ops act alone
    alone = random_adapter(ops, torch.Generator().manual_seed(1))
    bare = [replace(rows, ranks=(), gate_options=METEORA) for rows in alone.rows]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    base = random_base("gate_up", torch.Generator().manual_seed(3), torch.float32)
    delta = CpuDelta(build_route([placed], [3])).apply(0, "gate_up", x, base)
    expected = fused_output(x, base.weight, base.bias, 0, "gate_up", [replace(alone, rows=tuple(bare))] * 3)
    assert torch.allclose(delta, expected, atol=1e-4)
    assert torch.equal(fused_output(x, base.weight, base.bias, 0, "gate_up", [image] * 3), expected)


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("csr", {"nnz": 10}),
        ("csr", {"nnz": 8}),
        ("blocks", {"blockdiag": 3}),
        ("blocks", {"blockdiag_offset": None}),
        ("blocks", {"blockdiag_offset": 1 << 20}),
        ("pairs", {"rot2_group": 7}),
        ("pairs", {"rot2_group": 5}),
        ("pairs", {"c1_offset": None}),
        ("dense", {"dense_offset": 1 << 20}),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_at_load(op: str, changes: dict[str, Any]) -> None:
    image = random_adapter({(0, "q_proj"): ALONE[op]}, torch.Generator().manual_seed(1))
    rows = image.rows[0]
    assert rows.csr is not None or op != "csr"
    broken = replace(rows, csr=replace(rows.csr, **changes)) if rows.csr is not None else replace(rows, **changes)
    with pytest.raises(ImageError, match="upload the adapter again"):
        read_rare(image, broken, torch.float32)


@pytest.mark.parametrize(
    ("place_of", "value"), [("indptr", -1), ("indptr", 99), ("col", -1), ("col", SHAPES["q_proj"][1])]
)
def test_a_sparse_matrix_that_a_step_could_not_read_is_refused_at_load(place_of: str, value: int) -> None:
    image = random_adapter({(0, "q_proj"): Ops(csr=9)}, torch.Generator().manual_seed(1))
    rows = image.rows[0].csr
    assert rows is not None
    offset = (rows.indptr_offset if place_of == "indptr" else rows.col_offset) + 16
    image.data[offset : offset + 4].view(torch.int32)[0] = value
    with pytest.raises(ImageError, match="upload the adapter again"):
        read_rare(image, image.rows[0], torch.float32)

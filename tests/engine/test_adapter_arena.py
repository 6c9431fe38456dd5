"""Loads of every family into CPU slots: bytes as they are, and what no step may meet refused at the door."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from adapter_kernels.image import AdapterImage
from serve.engine.adapter_arena import AdapterArena
from serve.engine.plan import LoadResult
from tests.engine.arena_adapters import Images
from tests.kernels.model_adapters import SHAPES as MODEL_SHAPES
from tests.kernels.random_adapters import SHAPES, Ops, random_adapter

EVERYTHING = Ops((2, 3), top_k=1, cols=5, rows=3, bias=True, out_scale=True, in_scale=True)
# the tensors of EVERYTHING at k_proj (16 to 8), in the order of the image
TENSORS = ["gate", "A", "BT", "cols.D", "rows.D", "out_scale", "in_scale", "bias"]


def image_of(ops: Ops) -> AdapterImage:
    return random_adapter({(0, "k_proj"): ops, (1, "down_proj"): Ops((4,))}, torch.Generator().manual_seed(1))


def offset_of(image: AdapterImage, tensor: str) -> int:
    rows = image.rows[0]
    assert rows.cols is not None and rows.rows is not None
    offset = {
        "gate": rows.gate_offset,
        "A": rows.a_offset,
        "BT": rows.bt_offset,
        "cols.D": rows.cols.d_offset,
        "rows.D": rows.rows.d_offset,
        "out_scale": rows.out_scale_offset,
        "in_scale": rows.in_scale_offset,
        "bias": rows.bias_offset,
    }[tensor]
    assert offset is not None
    return offset


class Loads:
    """An arena and what it opens."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.images = Images({})
        self.arena = AdapterArena(SHAPES, dtype, self.images.open, MODEL_SHAPES)

    def load(self, image: AdapterImage, slot: int = 0) -> LoadResult:
        self.images.images["digest"] = image
        self.arena.start_load("digest", slot)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if results := self.arena.poll():
                return results[0]
            time.sleep(0.001)
        raise TimeoutError(f"slot {slot} was not loaded within 30 s")


@pytest.fixture
def loads() -> Iterator[Loads]:
    loads = Loads(torch.float32)
    yield loads
    loads.arena.close()


def test_an_adapter_of_every_op_counts_its_bytes(loads: Loads) -> None:
    result = loads.load(image_of(EVERYTHING))
    assert result.error is None
    # gate; A and rows.D, rounded up to 16 rows; BT; cols.D and both lists of channels; scales and bias; down_proj
    num_values = 2 * 16 + (5 + 16) * 16 + 5 * 8 + 16 * 8 + 2 * (16 + 16) + 8 + 16 + 8 + 4 * (16 + 40)
    assert result.num_bytes == 4 * num_values
    loads.arena.drop(0)
    assert loads.arena.num_slabs == 0


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_fails_the_load(tensor: str, value: float, loads: Loads) -> None:
    image = image_of(EVERYTHING)
    offset = offset_of(image, tensor)
    image.data[offset + 8 : offset + 12].view(torch.float32)[0] = value
    result = loads.load(image)
    assert result.error is not None and "layer 0, qkv: a weight is not finite" in result.error
    assert loads.arena.num_slabs == 0


@pytest.mark.parametrize(("values", "is_good"), [((3e38, 3e38), True), ((float("inf"), float("-inf")), False)])
def test_every_weight_is_judged_by_itself_and_not_by_the_sum(
    values: tuple[float, float], is_good: bool, loads: Loads
) -> None:
    image = image_of(EVERYTHING)
    offset = offset_of(image, "cols.D")
    image.data[offset : offset + 8].view(torch.float32)[:] = torch.tensor(values)
    assert (loads.load(image).error is None) == is_good


def test_a_weight_beyond_the_served_dtype_fails_the_load() -> None:
    loads = Loads(torch.float16)
    image = image_of(EVERYTHING)
    offset = offset_of(image, "cols.D")
    image.data[offset : offset + 4].view(torch.float32)[0] = 1e6
    assert "not finite in torch.float16" in str(loads.load(image).error)
    loads.arena.close()


def test_a_channel_that_the_site_lacks_fails_the_load(loads: Loads) -> None:
    image = image_of(EVERYTHING)
    cols = image.rows[0].cols
    assert cols is not None
    image.data[cols.idx_offset + 16 : cols.idx_offset + 20].view(torch.int32)[0] = 16
    assert "upload the adapter again" in str(loads.load(image).error)
    assert loads.arena.num_slabs == 0


def test_adapters_that_differ_in_a_gate_lie_apart_and_equal_ones_together(loads: Loads) -> None:
    for slot, ops in enumerate([EVERYTHING, EVERYTHING, replace(EVERYTHING, temperature=0.5), Ops((2, 3), top_k=2)]):
        assert loads.load(image_of(ops), slot).error is None
    slabs = [loads.arena.placement(slot).slab_id for slot in range(4)]
    assert slabs[0] == slabs[1] and len(set(slabs)) == 3


RARE = Ops(csr=5, is_ternary=True, dense=True, blockdiag=4, rot2_group=2, in_scale=True, out_scale=True)


def rare_offset(image: AdapterImage, tensor: str) -> int:
    rows = image.rows[0]
    assert rows.csr is not None and rows.csr.scale_offset is not None
    offset = {
        "csr.scale": rows.csr.scale_offset,
        "dense": rows.dense_offset,
        "blocks": rows.blockdiag_offset,
        "c0": rows.c0_offset,
        "in_scale": rows.in_scale_offset,
    }[tensor]
    assert offset is not None
    return offset


def test_what_no_slab_packs_is_counted_and_leaves_with_its_adapter(loads: Loads) -> None:
    result = loads.load(image_of(RARE))
    assert result.error is None
    # indptr, col and values of the signs; dense; both scales; blocks; pairs; down_proj
    num_values = (9 + 5 + 5) + 8 * 16 + (8 + 16) + 16 * 4 + 2 * 8 + 4 * (16 + 40)
    assert result.num_bytes == 4 * num_values
    extras = loads.arena.placement(0).extras
    assert extras is not None and extras.sites.keys() == {(0, "k_proj")}
    loads.arena.drop(0)
    assert loads.arena.num_slabs == 0
    # whoever lies at that place next brings nothing of it
    assert loads.load(random_adapter({(1, "down_proj"): Ops((4,))}, torch.Generator().manual_seed(1))).error is None
    assert loads.arena.placement(0).extras is None


@pytest.mark.parametrize("tensor", ["csr.scale", "dense", "blocks", "c0", "in_scale"])
def test_a_rare_weight_that_is_not_finite_fails_the_load(tensor: str, loads: Loads) -> None:
    image = image_of(RARE)
    offset = rare_offset(image, tensor)
    image.data[offset : offset + 4].view(torch.float32)[0] = float("nan")
    result = loads.load(image)
    assert result.error is not None and "layer 0, k_proj: a weight is not finite" in result.error
    assert loads.arena.num_slabs == 0


def test_a_sparse_column_that_the_site_lacks_fails_the_load(loads: Loads) -> None:
    image = image_of(RARE)
    assert image.rows[0].csr is not None
    offset = image.rows[0].csr.col_offset
    image.data[offset : offset + 4].view(torch.int32)[0] = 16
    assert "upload the adapter again" in str(loads.load(image).error)
    assert loads.arena.num_slabs == 0

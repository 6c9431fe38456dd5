"""qkv_sink against its definition: head dims, norms, rotations, ragged steps, adapters that lack projections."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapter_kernels.gpu.qkv_sink import qkv_sink
from adapter_kernels.gpu.sink_inputs import QkNormWeights, QkvDims
from adapter_kernels.gpu.step import SiteAdapters
from adapter_kernels.gpu.tables import SITES, DeviceTables
from adapter_kernels.reference_sinks import Heads, Norm
from adapter_kernels.reference_sinks import qkv_sink as reference_qkv_sink
from serve.model.families import NormKind
from serve.model.layers import make_norm
from serve.model.rope import RopeSpec
from serve.model.rotary import Rotary, Rotation, rotate
from tests.kernels.gpu.batches import (
    RANKS,
    batch_of,
    random_batch,
    random_image,
    random_tables,
    rank_capacity,
    tables_of,
)
from tests.kernels.gpu.sink_cases import RAGGED_STEPS, SinkCase, assert_close, make_sink_case

BLOCK_SIZE = 4
# of the first layer's sites, so that a wrong layer shows
FIRST_SITE = len(SITES)


@dataclass(frozen=True, slots=True)
class Model:
    """What of a base the sink depends on."""

    dims: QkvDims
    # None: no rotation
    rotary_dim: int | None = None
    # None: no norm; else whether it casts before the weight
    norm_casts_first: bool | None = None

    @property
    def widths(self) -> tuple[int, int, int]:
        """Output widths of q, k and v."""
        return (
            self.dims.num_heads * self.dims.head_dim,
            self.dims.num_kv_heads * self.dims.head_dim,
            self.dims.num_kv_heads * self.dims.head_dim,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the sites; nothing here reads A."""
        return {site: (width, 1) for site, width in zip(SITES[:3], self.widths, strict=True)}


@dataclass(frozen=True, slots=True)
class Inputs:
    """One call's base projection and where its rows go."""

    qkv: Tensor
    slot_mapping: Tensor
    cos: Tensor | None
    sin: Tensor | None
    norm: QkNormWeights | None


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the sink wrote into outputs full of NaN."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor


LLAMA = Model(QkvDims(4, 2, 32), rotary_dim=32)
SMALL = Model(QkvDims(1, 1, 32), rotary_dim=32)
MODELS = {
    "gqa": LLAMA,
    "head dim 80, partial rotary, norm": Model(QkvDims(2, 1, 80), rotary_dim=32, norm_casts_first=True),
    "head dim 96, no rotary": Model(QkvDims(2, 2, 96)),
    "head dim 128, fp32 norm": Model(QkvDims(2, 1, 128), rotary_dim=128, norm_casts_first=False),
    "head dim 96, odd halves": Model(QkvDims(1, 1, 96), rotary_dim=72),
}


def make_inputs(model: Model, num_rows: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(num_rows, sum(model.widths), generator=generator).to(dtype)
    order = torch.randperm(cache_blocks(num_rows) * BLOCK_SIZE, generator=generator)
    slot_mapping = order[:num_rows].int()
    # padding rows
    slot_mapping[2::7] = -1
    cos = sin = None
    if model.rotary_dim is not None:
        rope = RopeSpec("default", 10_000.0, model.rotary_dim, 1.0, 1.0, 1.0, (), (), 512, None, 512)
        positions = torch.randint(500, (num_rows,), generator=generator)
        rotation = Rotary(rope, 512, dtype, torch.device("cpu")).rotation(positions)
        cos, sin = rotation.cos[:, 0], rotation.sin[:, 0]
    norm = None
    if model.norm_casts_first is not None:
        weights = torch.rand(2, model.dims.head_dim, generator=generator) + 0.5
        weights = weights.to(dtype if model.norm_casts_first else torch.float32)
        norm = QkNormWeights(weights[0], weights[1], 1e-6, model.norm_casts_first)
    return Inputs(qkv, slot_mapping, cos, sin, norm)


def cache_blocks(num_rows: int) -> int:
    return num_rows // BLOCK_SIZE + 2


def run(model: Model, inputs: Inputs, adapters: SiteAdapters | None) -> Outputs:
    num_rows, dims = inputs.qkv.shape[0], model.dims
    cache = (cache_blocks(num_rows), BLOCK_SIZE, dims.num_kv_heads, dims.head_dim)
    q, k_cache, v_cache = (
        torch.full(shape, torch.nan, dtype=inputs.qkv.dtype)
        for shape in ((num_rows, dims.num_heads, dims.head_dim), cache, cache)
    )
    qkv_sink(
        inputs.qkv,
        adapters,
        q_out=q,
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=inputs.slot_mapping,
        cos=inputs.cos,
        sin=inputs.sin,
        norm=inputs.norm,
        dims=dims,
    )
    return Outputs(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1))


def reference(model: Model, inputs: Inputs, delta: Tensor | None) -> Heads:
    norm = inputs.norm
    return reference_qkv_sink(
        inputs.qkv.double(),
        delta,
        model.dims.num_heads,
        model.dims.num_kv_heads,
        q_norm=None if norm is None else Norm(norm.q_weight.double(), norm.eps),
        k_norm=None if norm is None else Norm(norm.k_weight.double(), norm.eps),
        rotation=None if inputs.cos is None or inputs.sin is None else (inputs.cos.double(), inputs.sin.double()),
    )


def check(model: Model, inputs: Inputs, out: Outputs, expected: Heads) -> None:
    """Compare all rows, and see that the caches changed at the mapped slots only."""
    assert_close(out.q, expected.q)
    is_kept = inputs.slot_mapping >= 0
    slots = inputs.slot_mapping[is_kept].long()
    for cache, rows in ((out.k_cache, expected.k), (out.v_cache, expected.v)):
        assert_close(cache[slots], rows[is_kept])
        others = torch.ones(cache.shape[0], dtype=torch.bool)
        others[slots] = False
        assert bool(cache[others].isnan().all())


def mixed_case(
    model: Model,
    num_rows: int,
    dtype: torch.dtype,
    ranks: tuple[int, ...],
    num_splits: int,
    popularity: str = "uniform",
) -> SinkCase:
    tables = random_tables(model.shapes, ranks, dtype=dtype, num_layers=2)
    batch = random_batch(num_rows, len(ranks), popularity, seed=num_rows)
    return make_sink_case(
        tables, batch, FIRST_SITE, model.widths, num_splits=num_splits, rank_capacity=rank_capacity(ranks)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_rows, dtype", [(3, torch.float32), (17, torch.float16)])
def test_a_step_without_adapters(name: str, num_rows: int, dtype: torch.dtype) -> None:
    model = MODELS[name]
    inputs = make_inputs(model, num_rows, dtype)
    check(model, inputs, run(model, inputs, None), reference(model, inputs, None))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_rows, dtype", [(5, torch.float16), (17, torch.float32)])
def test_every_model_with_a_mixed_batch(name: str, num_rows: int, dtype: torch.dtype) -> None:
    model = MODELS[name]
    inputs = make_inputs(model, num_rows, dtype)
    case = mixed_case(model, num_rows, dtype, (3, 16, 17), num_splits=2)
    check(model, inputs, run(model, inputs, case.adapters), reference(model, inputs, case.delta))


@pytest.mark.parametrize("num_rows, popularity, dtype", RAGGED_STEPS)
def test_ragged_steps_of_any_popularity(num_rows: int, popularity: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, num_rows, dtype)
    case = mixed_case(SMALL, num_rows, dtype, (17, 3, 8, 0, 16, 1), num_splits=4, popularity=popularity)
    check(SMALL, inputs, run(SMALL, inputs, case.adapters), reference(SMALL, inputs, case.delta))


@pytest.mark.parametrize("block_rows", [1, 16, 64])
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_in_every_path(rank: int, block_rows: int) -> None:
    tables = random_tables(SMALL.shapes, (rank,), num_layers=2)
    case = make_sink_case(
        tables,
        batch_of([0, None]),
        FIRST_SITE,
        SMALL.widths,
        rank_capacity=rank_capacity((rank,)),
        block_rows=block_rows,
    )
    inputs = make_inputs(SMALL, 2, torch.float32)
    check(SMALL, inputs, run(SMALL, inputs, case.adapters), reference(SMALL, inputs, case.delta))


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("sites", [("q_proj",), ("v_proj",), ("q_proj", "v_proj"), ()])
def test_an_adapter_may_lack_projections(sites: tuple[str, ...], block_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    image = random_image(LLAMA.shapes, {(1, site): 5 for site in sites}, generator)
    tables = tables_of([image], 2, torch.float32)
    case = make_sink_case(tables, batch_of([0, None, 0]), FIRST_SITE, LLAMA.widths, block_rows=block_rows)
    inputs = make_inputs(LLAMA, 3, torch.float32)
    check(LLAMA, inputs, run(LLAMA, inputs, case.adapters), reference(LLAMA, inputs, case.delta))


@pytest.mark.parametrize("name", ["gqa", "head dim 128, fp32 norm"])
@pytest.mark.parametrize("num_rows, dtype", [(7, torch.float16), (17, torch.float32)])
def test_rows_without_adapter_have_the_bits_of_a_step_without_adapters(
    name: str, num_rows: int, dtype: torch.dtype
) -> None:
    model = MODELS[name]
    inputs = make_inputs(model, num_rows, dtype)
    case = mixed_case(model, num_rows, dtype, (3, 0, 17), num_splits=2)
    assert 0 < int(case.is_bare.sum()) < num_rows
    mixed, alone = run(model, inputs, case.adapters), run(model, inputs, None)
    assert torch.equal(mixed.q[case.is_bare], alone.q[case.is_bare])
    slots = inputs.slot_mapping[case.is_bare & (inputs.slot_mapping >= 0)].long()
    assert torch.equal(mixed.k_cache[slots], alone.k_cache[slots])
    assert torch.equal(mixed.v_cache[slots], alone.v_cache[slots])


@pytest.mark.parametrize("block_rows", [1, 16])
def test_a_broken_adapter_poisons_only_its_own_rows(block_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    ranks = {(1, site): 3 for site in SITES[:3]}
    broken = random_image(LLAMA.shapes, ranks, generator, filled=torch.nan)
    tables = tables_of([random_image(LLAMA.shapes, ranks, generator), broken], 2, torch.float32)
    case = make_sink_case(tables, batch_of([0, 1, None, 1, 0]), FIRST_SITE, LLAMA.widths, block_rows=block_rows)
    inputs = make_inputs(LLAMA, 5, torch.float32)
    out, expected = run(LLAMA, inputs, case.adapters), reference(LLAMA, inputs, case.delta)
    healthy = [0, 2, 4]
    assert_close(out.q[healthy], expected.q[healthy])
    assert bool(out.q[[1, 3]].isnan().all())


def test_a_step_of_padding_writes_no_cache() -> None:
    inputs = make_inputs(LLAMA, 2, torch.float32)
    inputs.slot_mapping.fill_(-1)
    out = run(LLAMA, inputs, None)
    assert bool(out.k_cache.isnan().all()) and bool(out.v_cache.isnan().all())
    assert_close(out.q, reference(LLAMA, inputs, None).q)


def test_fp16_rounds_where_the_cpu_path_rounds() -> None:
    model = MODELS["head dim 80, partial rotary, norm"]
    inputs = make_inputs(model, 9, torch.float16)
    case = mixed_case(model, 9, torch.float16, (3, 0), num_splits=1)
    assert inputs.norm is not None and inputs.cos is not None and inputs.sin is not None
    dims = model.dims
    summed = torch.where(case.delta == 0, inputs.qkv, (inputs.qkv + case.delta).half())
    queries = summed[:, : model.widths[0]].view(9, dims.num_heads, dims.head_dim)
    normed = make_norm(inputs.norm.q_weight, inputs.norm.eps, NormKind.CAST_THEN_SCALE)(queries)
    turned = rotate(normed, Rotation(inputs.cos[:, None], inputs.sin[:, None]))
    # a last bit may differ where torch's sums run in another order
    assert float((run(model, inputs, case.adapters).q == turned).float().mean()) > 0.98


def test_tables_of_no_slot_are_not_read() -> None:
    tables = DeviceTables.build(2, 1, torch.zeros(32))
    case = make_sink_case(tables, batch_of([None, None]), FIRST_SITE, LLAMA.widths)
    inputs = make_inputs(LLAMA, 2, torch.float32)
    check(LLAMA, inputs, run(LLAMA, inputs, case.adapters), reference(LLAMA, inputs, None))

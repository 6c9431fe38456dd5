"""swiglu_sink against its definition: activations, ragged steps, ranks, adapters that lack gate or up."""

import pytest
import torch
from torch import Tensor

from adapter_kernels.gpu.activations import ACTIVATIONS
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.step import SiteAdapters
from adapter_kernels.gpu.swiglu_sink import swiglu_sink
from adapter_kernels.gpu.tables import first_site
from adapter_kernels.reference_sinks import swiglu_sink as reference_swiglu_sink
from serve.model.layers import make_activation
from tests.kernels.gpu.batches import (
    RANKS,
    batch_of,
    random_batch,
    random_image,
    random_tables,
    rank_capacity,
    tables_of,
)
from tests.kernels.gpu.launches import record_launches
from tests.kernels.gpu.sink_cases import RAGGED_STEPS, SinkCase, assert_close, make_sink_case

# not a multiple of the tile
WIDTH = 72
SHAPES = {"gate_proj": (WIDTH, 1), "up_proj": (WIDTH, 1)}
WIDTHS = (WIDTH, WIDTH)
FIRST_SITE = first_site(1, "gate_up")
# narrow enough for several tiles
CONFIG = LaunchConfig(block_r=16, block_o=64)


def projection(num_rows: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return (torch.randn(num_rows, 2 * WIDTH, generator=generator) * 2).to(dtype)


def run(gate_up: Tensor, adapters: SiteAdapters | None, activation: str = "silu") -> Tensor:
    out = torch.full((gate_up.shape[0], gate_up.shape[1] // 2), torch.nan, dtype=gate_up.dtype)
    swiglu_sink(gate_up, adapters, activation=activation, out=out, config=CONFIG)
    return out


def mixed_case(
    num_rows: int, dtype: torch.dtype, ranks: tuple[int, ...], num_splits: int, popularity: str = "uniform"
) -> SinkCase:
    tables = random_tables(SHAPES, ranks, dtype=dtype, num_layers=2)
    batch = random_batch(num_rows, len(ranks), popularity, seed=num_rows)
    return make_sink_case(tables, batch, FIRST_SITE, WIDTHS, num_splits=num_splits, rank_capacity=rank_capacity(ranks))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_activation_with_and_without_adapters(activation: str, dtype: torch.dtype) -> None:
    gate_up = projection(5, dtype)
    gate_up[0, :4] = torch.tensor([0.0, 60.0, -60.0, 1e-4])
    case = mixed_case(5, dtype, (3, 17, 16), num_splits=2)
    assert_close(run(gate_up, None, activation), reference_swiglu_sink(gate_up.double(), None, activation))
    expected = reference_swiglu_sink(gate_up.double(), case.delta, activation)
    assert_close(run(gate_up, case.adapters, activation), expected)


@pytest.mark.parametrize("num_rows, popularity, dtype", RAGGED_STEPS)
def test_ragged_steps_of_any_popularity(num_rows: int, popularity: str, dtype: torch.dtype) -> None:
    gate_up = projection(num_rows, dtype)
    case = mixed_case(num_rows, dtype, (17, 3, 8, 0, 16, 1), num_splits=4, popularity=popularity)
    assert_close(run(gate_up, case.adapters), reference_swiglu_sink(gate_up.double(), case.delta, "silu"))


@pytest.mark.parametrize("block_rows", [1, 16, 64])
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_in_every_path(rank: int, block_rows: int) -> None:
    tables = random_tables(SHAPES, (rank,), num_layers=2)
    capacity = rank_capacity((rank,))
    batch = batch_of([0, None])
    case = make_sink_case(tables, batch, FIRST_SITE, WIDTHS, rank_capacity=capacity, block_rows=block_rows)
    gate_up = projection(2, torch.float32)
    assert_close(run(gate_up, case.adapters), reference_swiglu_sink(gate_up.double(), case.delta, "silu"))


@pytest.mark.parametrize("block_rows", [1, 16])
@pytest.mark.parametrize("ranks", [{"gate_proj": 17}, {"up_proj": 3}, {"gate_proj": 2, "up_proj": 33}, {}])
def test_an_adapter_may_lack_gate_or_up(ranks: dict[str, int], block_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    biased = frozenset({(1, "up_proj")}) if "up_proj" not in ranks else frozenset()
    image = random_image(SHAPES, {(1, site): rank for site, rank in ranks.items()}, generator, biased=biased)
    tables = tables_of([image], 2, torch.float32)
    case = make_sink_case(
        tables, batch_of([0, None, 0]), FIRST_SITE, WIDTHS, rank_capacity=64, block_rows=block_rows, num_splits=2
    )
    gate_up = projection(3, torch.float32)
    assert_close(run(gate_up, case.adapters), reference_swiglu_sink(gate_up.double(), case.delta, "silu"))


@pytest.mark.parametrize("num_rows, dtype", [(7, torch.float16), (17, torch.float32)])
def test_rows_without_adapter_have_the_bits_of_a_step_without_adapters(num_rows: int, dtype: torch.dtype) -> None:
    gate_up = projection(num_rows, dtype)
    case = mixed_case(num_rows, dtype, (3, 0, 17), num_splits=2)
    assert 0 < int(case.is_bare.sum()) < num_rows
    mixed, alone = run(gate_up, case.adapters), run(gate_up, None)
    assert torch.equal(mixed[case.is_bare], alone[case.is_bare])


@pytest.mark.parametrize("block_rows", [1, 16])
def test_a_broken_adapter_poisons_only_its_own_rows(block_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    ranks = {(1, site): 3 for site in SHAPES}
    broken = random_image(SHAPES, ranks, generator, filled=torch.nan)
    tables = tables_of([random_image(SHAPES, ranks, generator), broken], 2, torch.float32)
    case = make_sink_case(tables, batch_of([0, 1, None, 1, 0]), FIRST_SITE, WIDTHS, block_rows=block_rows)
    gate_up = projection(5, torch.float32)
    out, expected = run(gate_up, case.adapters), reference_swiglu_sink(gate_up.double(), case.delta, "silu")
    assert_close(out[[0, 2, 4]], expected[[0, 2, 4]])
    assert bool(out[[1, 3]].isnan().all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp16_rounds_where_the_cpu_path_rounds(activation: str) -> None:
    gate_up = projection(9, torch.float16)
    case = mixed_case(9, torch.float16, (3, 0), num_splits=1)
    gate, up = torch.where(case.delta == 0, gate_up, (gate_up + case.delta).half()).chunk(2, dim=-1)
    expected = make_activation(activation)(gate) * up
    # a last bit may differ where exp or erf does
    assert float((run(gate_up, case.adapters, activation) == expected).float().mean()) > 0.98


def test_no_rows_launch_nothing() -> None:
    with record_launches() as launches:
        swiglu_sink(torch.empty(0, 8), None, activation="silu", out=torch.empty(0, 4))
    assert launches == []

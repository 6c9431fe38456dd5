"""Shrink under the interpreter against the reference: ragged rows, any rank, any mix, nothing written beside it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapter_kernels import reference
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.shrink import num_planes, num_splits, shrink
from adapter_kernels.gpu.tables import DeviceTables, first_site
from tests.kernels.gpu.batches import (
    POPULARITIES,
    RAGGED_ROWS,
    RANKS,
    Batch,
    batch_of,
    random_batch,
    random_image,
    random_tables,
    rank_capacity,
    route_of,
    tables_of,
)
from tests.kernels.gpu.bridges import DTYPES, SHAPES, SHRINK_TOLERANCE, is_close, nan_like, random_rows
from tests.kernels.gpu.launches import record_launches

# small tiles: K and rank loops run several times also on small sites
CONFIG = LaunchConfig(block_k=32, block_r=16)
IN_DIM = SHAPES["q_proj"][1]
QKV = first_site(0, "qkv")


@dataclass(frozen=True, slots=True)
class Case:
    """One shrink of a fused site and its input."""

    x: Tensor
    tables: DeviceTables
    batch: Batch
    site: int = QKV
    members: int = 3


def shrunk(
    case: Case, *, splits: int = 1, block_rows: int | None = None, config: LaunchConfig | None = CONFIG
) -> Tensor:
    """Run the kernel into NaN memory of rank capacity 256."""
    bridge = nan_like(splits, case.batch.num_rows, case.members, rank_capacity(RANKS))
    route = route_of(case.batch, block_rows)
    shrink(case.x, case.tables, case.site, case.members, route, bridge, config=config)
    return bridge


def check(case: Case, bridge: Tensor) -> None:
    """Compare every row and member, and see that nothing else was written."""
    expected = reference.table_bridge(case.x, case.tables, case.site, case.members, case.batch.slots)
    for token in range(case.batch.num_rows):
        for member in range(case.members):
            c = expected[token][member]
            planes = bridge[:, token, member]
            assert is_close(planes[:, : c.numel()].sum(dim=0), c, SHRINK_TOLERANCE), (token, member)
            assert bool(planes[:, c.numel() :].isnan().all()), (token, member)


def qkv_case(num_rows: int, ranks: tuple[int, ...], popularity: str, dtype: torch.dtype = torch.float32) -> Case:
    """Build a random case at the fused qkv site."""
    tables = random_tables(SHAPES, ranks, seed=num_rows, dtype=dtype)
    batch = random_batch(num_rows, len(ranks), popularity, seed=num_rows)
    return Case(random_rows(num_rows, IN_DIM, dtype, seed=7), tables, batch)


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", RAGGED_ROWS)
def test_each_row_meets_its_own_adapter(num_rows: int, popularity: str) -> None:
    case = qkv_case(num_rows, (17, 3, 8, 0, 16, 1), popularity)
    check(case, shrunk(case))


@pytest.mark.parametrize("block_rows", [1, 16, 64])
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_in_every_path(rank: int, block_rows: int) -> None:
    case = qkv_case(3, (rank,), "identical")
    check(case, shrunk(case, block_rows=block_rows, config=LaunchConfig(block_k=64, block_r=64)))


@pytest.mark.parametrize("block_rows", [1, 16])
def test_half_precision_sums_in_single(block_rows: int) -> None:
    case = qkv_case(5, (17, 8, 16), "distinct", torch.float16)
    check(case, shrunk(case, block_rows=block_rows))


@pytest.mark.parametrize("block_rows", [1, 16])
def test_planes_sum_to_the_coefficients(block_rows: int) -> None:
    case = qkv_case(4, (8, 3), "distinct")
    # 100 columns in tiles of 32: the last of eight planes are empty, and zeros
    bridge = shrunk(case, splits=8, block_rows=block_rows)
    check(case, bridge)
    assert bool((bridge[4:, 0, 0, :8] == 0).all())


@pytest.mark.parametrize("block_rows", [1, 16, 64])
def test_default_tiles_on_a_site_of_one_member(block_rows: int) -> None:
    tables = random_tables(SHAPES, (16, 3, 8))
    batch = random_batch(17, 3, "uniform")
    case = Case(random_rows(17, SHAPES["down_proj"][1], torch.float32, seed=1), tables, batch, first_site(0, "down"), 1)
    check(case, shrunk(case, block_rows=block_rows, config=None))


# numpy, under the interpreter, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("block_rows", [1, 16])
def test_a_broken_adapter_and_a_broken_row_stay_alone(block_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = {(0, site): 8 for site in ("q_proj", "k_proj", "v_proj")}
    broken = [random_image(SHAPES, keys, generator, filled=value) for value in (torch.nan, torch.inf)]
    tables = tables_of([random_image(SHAPES, keys, generator), *broken], 1, torch.float32)
    batch = batch_of([0, 1, None, 2, 0, 0])
    x = random_rows(6, IN_DIM, torch.float32, seed=2)
    clean = shrunk(Case(x, tables, batch_of([0, None, None, None, 0, None])), block_rows=block_rows)
    x[5] = torch.nan
    # a row without adapter is not read at all
    x[2] = torch.nan
    bridge = shrunk(Case(x, tables, batch), block_rows=block_rows)
    for row in (0, 4):
        assert torch.equal(bridge[:, row, :, :8], clean[:, row, :, :8])
    assert bool(bridge[0, 2].isnan().all())
    assert not bool(bridge[0, [1, 3, 5], :, :8].isfinite().any())


def test_a_rows_bits_do_not_depend_on_its_batch() -> None:
    case = qkv_case(40, (8, 3, 17), "uniform")
    alone = batch_of([int(case.batch.slots[0])])
    together = shrunk(case, splits=4)[:, 0]
    single = shrunk(Case(case.x[:1], case.tables, alone), splits=4, block_rows=16)[:, 0]
    assert torch.equal(together.nan_to_num(), single.nan_to_num())


@pytest.mark.parametrize("num_rows", [12, 133])
def test_the_grid_knows_the_step_and_not_the_residents(num_rows: int) -> None:
    grids = set()
    for num_slots in (4, 100, 2000):
        arena = torch.zeros(64)
        tables = DeviceTables.build(1, num_slots, arena)
        batch = batch_of([index % 4 for index in range(num_rows)])
        with record_launches(executed=False) as launches:
            shrunk(Case(torch.zeros(num_rows, IN_DIM), tables, batch))
        grids.add(tuple((launch.kernel, launch.grid) for launch in launches))
    assert len(grids) == 1
    assert len(next(iter(grids))) == 1


def test_the_number_of_planes_is_the_sites() -> None:
    assert [num_splits(width) for width in (896, 1023, 1024, 4096, 8191, 8192, 14336)] == [1, 1, 4, 4, 4, 8, 8]


def test_planes_are_one_where_blocks_are_many() -> None:
    assert [num_planes(8, block_rows) for block_rows in (1, 16, 64)] == [8, 8, 1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", RAGGED_ROWS)
@pytest.mark.parametrize("block_rows", [None, 1, 16, 64])
def test_the_whole_matrix(block_rows: int | None, num_rows: int, popularity: str, dtype: torch.dtype) -> None:
    case = qkv_case(num_rows, (*RANKS, 0, *RANKS), popularity, dtype)
    check(case, shrunk(case, splits=2, block_rows=block_rows, config=LaunchConfig(block_k=64, block_r=32)))

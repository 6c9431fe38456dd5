"""Expand under the interpreter against the reference: ragged rows, any rank, any mix, nothing written beside it."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapter_kernels import reference
from adapter_kernels.gpu.expand import expand
from adapter_kernels.gpu.launch_config import LaunchConfig
from adapter_kernels.gpu.shrink import shrink
from adapter_kernels.gpu.tables import DeviceTables, first_site, table_entries
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
from tests.kernels.gpu.bridges import DTYPES, SHAPES, TOLERANCES, bridge_of, is_close, nan_like, random_rows
from tests.kernels.gpu.launches import record_launches

# small tiles: column and rank loops run several times also on small sites
CONFIG = LaunchConfig(block_o=32, block_r=16)
IN_DIM = SHAPES["q_proj"][1]
WIDTHS = tuple(SHAPES[site][0] for site in ("q_proj", "k_proj", "v_proj"))
QKV = first_site(0, "qkv")


@dataclass(frozen=True, slots=True)
class Case:
    """One expand of a fused site and the input that its bridge was made from."""

    x: Tensor
    tables: DeviceTables
    batch: Batch
    site: int = QKV
    widths: tuple[int, ...] = WIDTHS

    def acts(self) -> Tensor:
        """[T, sum of widths] bool: which elements of the output an adapter acts on."""
        members = reference.table_acts(self.tables, self.site, len(self.widths), self.batch.slots)
        return members.repeat_interleave(torch.tensor(self.widths), dim=1)


def expanded(
    case: Case,
    out: Tensor | None = None,
    *,
    splits: int = 1,
    block_rows: int | None = None,
    config: LaunchConfig | None = CONFIG,
) -> Tensor:
    """Run the kernel: into NaN memory, or added to `out`."""
    ranks = case.tables.rows[:, :, 3].reshape(-1).tolist()
    capacity = rank_capacity([*ranks, 1])
    slots = case.batch.slots
    bridge = bridge_of(case.x, case.tables, case.site, len(case.widths), slots, splits=splits, capacity=capacity)
    result = nan_like(len(slots), sum(case.widths), dtype=case.x.dtype) if out is None else out
    route = route_of(case.batch, block_rows)
    accumulate = out is not None
    expand(bridge, case.tables, case.site, case.widths, route, result, accumulate=accumulate, config=config)
    return result


def check(case: Case, out: Tensor) -> None:
    """Compare what was written row by row, and see that nothing else was."""
    expected = reference.table_delta(case.x, case.tables, case.site, case.widths, case.batch.slots)
    acts = case.acts()
    assert bool(out[~acts].isnan().all())
    for token in range(case.batch.num_rows):
        written = acts[token]
        assert is_close(out[token, written], expected[token, written], TOLERANCES[out.dtype]), token


def qkv_case(num_rows: int, ranks: tuple[int, ...], popularity: str, dtype: torch.dtype = torch.float32) -> Case:
    """Build a random case at the fused qkv site."""
    tables = random_tables(SHAPES, ranks, seed=num_rows, dtype=dtype)
    batch = random_batch(num_rows, len(ranks), popularity, seed=num_rows)
    return Case(random_rows(num_rows, IN_DIM, dtype, seed=7), tables, batch)


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", RAGGED_ROWS)
def test_each_row_meets_its_own_rank_rows(num_rows: int, popularity: str) -> None:
    case = qkv_case(num_rows, (17, 3, 8, 0, 16, 1), popularity)
    check(case, expanded(case))


@pytest.mark.parametrize("block_rows", [1, 16, 64])
@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_in_every_path(rank: int, block_rows: int) -> None:
    case = qkv_case(3, (rank,), "identical")
    check(case, expanded(case, block_rows=block_rows, config=LaunchConfig(block_o=128, block_r=64)))


@pytest.mark.parametrize("block_rows", [1, 16])
def test_half_precision_rounds_the_bridge_once(block_rows: int) -> None:
    case = qkv_case(5, (17, 8, 16), "distinct", torch.float16)
    check(case, expanded(case, block_rows=block_rows))


@pytest.mark.parametrize("splits", [4, 8])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_all_planes_are_summed(block_rows: int, splits: int) -> None:
    case = qkv_case(4, (8, 3, 17), "distinct")
    check(case, expanded(case, splits=splits, block_rows=block_rows))


@pytest.mark.parametrize("block_rows", [1, 16])
def test_accumulating_adds_and_leaves_other_rows_their_bits(block_rows: int) -> None:
    case = qkv_case(9, (8, 3, 17), "uniform", torch.float16)
    base = random_rows(9, sum(WIDTHS), torch.float16, seed=5)
    # minus zero plus zero would be zero: a row that is not touched keeps even that
    base[0, :] = -0.0
    out = expanded(case, base.clone(), block_rows=block_rows)
    acts = case.acts()
    assert torch.equal(out[~acts].view(torch.int16), base[~acts].view(torch.int16))
    expected = base.float() + reference.table_delta(case.x, case.tables, QKV, WIDTHS, case.batch.slots)
    assert is_close(out[acts], expected[acts], TOLERANCES[torch.float16])


@pytest.mark.parametrize("block_rows", [1, 16, 64])
def test_default_tiles_on_a_site_of_one_member(block_rows: int) -> None:
    tables = random_tables(SHAPES, (16, 3, 8))
    x = random_rows(17, SHAPES["o_proj"][1], torch.float32, seed=1)
    case = Case(x, tables, random_batch(17, 3, "uniform"), first_site(0, "o"), (SHAPES["o_proj"][0],))
    check(case, expanded(case, block_rows=block_rows, config=None))


@pytest.mark.parametrize("block_rows", [1, 16])
def test_the_output_may_be_a_part_of_wider_rows(block_rows: int) -> None:
    case = qkv_case(3, (8,), "identical")
    wide = nan_like(3, sum(WIDTHS) + 50)
    wide[:, : sum(WIDTHS)] = 0
    out = expanded(case, wide, block_rows=block_rows)
    assert bool(out[:, sum(WIDTHS) :].isnan().all())
    expected = reference.table_delta(case.x, case.tables, QKV, WIDTHS, case.batch.slots)
    assert is_close(out[:, : sum(WIDTHS)], expected, TOLERANCES[torch.float32])


# numpy, under the interpreter, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("block_rows", [1, 16])
def test_a_broken_adapter_and_a_broken_bridge_stay_alone(block_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = {(0, site): 8 for site in ("q_proj", "k_proj", "v_proj")}
    broken = [random_image(SHAPES, keys, generator, filled=value) for value in (torch.nan, torch.inf)]
    tables = tables_of([random_image(SHAPES, keys, generator), *broken], 1, torch.float32)
    x = random_rows(6, IN_DIM, torch.float32, seed=2)
    clean = expanded(Case(x, tables, batch_of([0, None, None, None, 0, None])), block_rows=block_rows)
    x[5] = torch.nan
    out = expanded(Case(x, tables, batch_of([0, 1, None, 2, 0, 0])), block_rows=block_rows)
    for row in (0, 4):
        assert torch.equal(out[row], clean[row])
    assert bool(out[2].isnan().all())
    assert not bool(out[[1, 3, 5]].isfinite().any())


def test_a_rows_bits_do_not_depend_on_its_batch() -> None:
    case = qkv_case(40, (8, 3, 17), "uniform")
    alone = Case(case.x[:1], case.tables, batch_of([int(case.batch.slots[0])]))
    together = expanded(case, splits=4)[0]
    single = expanded(alone, splits=4, block_rows=16)[0]
    assert torch.equal(together.nan_to_num(), single.nan_to_num())


@pytest.mark.parametrize("num_rows", [12, 133])
def test_the_grid_knows_the_step_and_not_the_residents(num_rows: int) -> None:
    grids = set()
    for num_slots in (4, 100, 2000):
        tables = DeviceTables.build(1, num_slots, torch.zeros(64))
        route = route_of(batch_of([index % 4 for index in range(num_rows)]))
        with record_launches(executed=False) as launches:
            bridge = torch.zeros(1, num_rows, 3, 16)
            expand(bridge, tables, QKV, WIDTHS, route, torch.zeros(num_rows, sum(WIDTHS)), accumulate=False)
        grids.add(tuple((launch.kernel, launch.grid) for launch in launches))
    assert len(grids) == 1
    assert len(next(iter(grids))) == 1


@pytest.mark.parametrize("block_rows", [1, 16])
def test_a_bias_may_lie_at_the_arenas_first_byte(block_rows: int) -> None:
    image = random_image(SHAPES, {}, torch.Generator().manual_seed(3), biased=frozenset({(0, "k_proj")}))
    tables = DeviceTables.build(1, 1, image.data.view(torch.float32))
    tables.write(0, table_entries(image, 1, 0))
    assert tables.rows[QKV + 1, 0, :4].tolist() == [0, 0, 0, 0]
    case = Case(random_rows(2, IN_DIM, torch.float32, seed=2), tables, batch_of([0, None]))
    check(case, expanded(case, block_rows=block_rows))


def test_shrink_and_expand_together_are_the_delta() -> None:
    case = qkv_case(20, (17, 3, 8), "zipf")
    bridge = nan_like(4, 20, 3, 32)
    route = route_of(case.batch)
    shrink(case.x, case.tables, QKV, 3, route, bridge, config=LaunchConfig(block_k=32))
    out = nan_like(20, sum(WIDTHS))
    expand(bridge, case.tables, QKV, WIDTHS, route, out, accumulate=False, config=CONFIG)
    check(case, out)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", RAGGED_ROWS)
@pytest.mark.parametrize("block_rows", [None, 1, 16, 64])
def test_the_whole_matrix(block_rows: int | None, num_rows: int, popularity: str, dtype: torch.dtype) -> None:
    case = qkv_case(num_rows, (*RANKS, 0, *RANKS), popularity, dtype)
    check(case, expanded(case, splits=2, block_rows=block_rows, config=LaunchConfig(block_o=64, block_r=32)))

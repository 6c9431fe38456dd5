"""The compiled low-rank kernel: the reference's values, the same bits in any company, nothing else touched."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.native_cpu import CpuKernels
from adapter_kernels.native_layouts import LowRankMember, LowRankSite, RunTable
from adapter_kernels.route import build_route
from adapter_kernels.slab import CAPACITY
from tests.kernels.compiled import kernels as kernels
from tests.kernels.cpu_steps import check_step, in_place_order, place, random_base
from tests.kernels.random_adapters import random_image, uniform_ranks
from tests.kernels.test_cpu_delta import POPULARITY, choose

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Given:
    """A base layer whose product is known; `adapter_kernels.delta.BaseLinear`."""

    y: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.y


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", POPULARITY)
def test_mixed_ranks_in_one_step_match_the_reference(kernels: CpuKernels, kind: str) -> None:
    rng = random.Random(7)
    generator = torch.Generator().manual_seed(7)
    images = [random_image(uniform_ranks(rank), generator, BF16) for rank in [1, 3, 8, 16, 64, 8, 8, 8, 17]]
    chosen = choose(kind, 24, len(images), rng)
    counts = [rng.choice([1, 1, 1, 2, 7, 17, 63]) for _ in chosen]
    check_step(images, chosen, counts, BF16, kernels=kernels)


def test_partial_targets_biases_and_several_slabs_match_the_reference(kernels: CpuKernels) -> None:
    generator = torch.Generator().manual_seed(3)
    partial = [
        random_image({(0, "q_proj"): 4, (0, "v_proj"): 2, (1, "down_proj"): 5}, generator, BF16),
        random_image({(1, "up_proj"): 3}, generator, BF16),
        # a bias is not the kernel's: this site falls to torch, the others of the same step do not
        random_image(uniform_ranks(4), generator, BF16, biased=frozenset({(0, "q_proj")})),
    ]
    check_step(partial, [0, 1, 2, None, 0, 2, 1, 1], [1, 3, 1, 2, 12, 1, 1, 30], BF16, kernels=kernels)
    many = [random_image(uniform_ranks(2), generator, BF16) for _ in range(CAPACITY * 2 + 3)]
    check_step(many, list(range(len(many))), [1] * len(many), BF16, kernels=kernels)


def test_it_is_the_kernel_that_acts(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    places = place([random_image(uniform_ranks(4), generator, BF16)], BF16)
    base, x = random_base("qkv", generator, BF16), torch.randn(2, 16, generator=generator).to(BF16)
    calls: list[int] = []
    monkeypatch.setattr(CpuKernels, "add_low_rank", lambda self, site, runs, x, y: calls.append(runs.num_runs))
    y = CpuDelta(build_route([*places], [2]), kernels=kernels).apply(0, "qkv", x, base)
    assert calls == [1]
    assert torch.equal(y, base(x)), "with the kernel's call taken away nothing else adds"


def test_an_input_whose_values_lie_apart_is_read_all_the_same(kernels: CpuKernels) -> None:
    generator = torch.Generator().manual_seed(6)
    places = place([random_image(uniform_ranks(4), generator, BF16)], BF16)
    base, x = random_base("qkv", generator, BF16), torch.randn(3, 16, generator=generator).to(BF16)
    delta = CpuDelta(build_route([*places], [3]), kernels=kernels)
    apart = x.t().contiguous().t()
    assert apart.stride(1) != 1
    assert torch.equal(delta.apply(0, "qkv", apart, Given(base(x))), delta.apply(0, "qkv", x, Given(base(x))))


def test_a_row_has_the_same_bits_alone_and_in_company(kernels: CpuKernels, two_threads: None) -> None:
    generator = torch.Generator().manual_seed(9)
    places = place([random_image(uniform_ranks(7), generator, BF16) for _ in range(5)], BF16)
    counts = [1, 5, 40, 3, 2]
    order = in_place_order([*places], counts)
    together = CpuDelta(build_route([places[i] for i in order], [counts[i] for i in order]), kernels=kernels)
    for site in ("qkv", "o", "gate_up", "down"):
        base = random_base(site, generator, BF16)
        x = torch.randn(sum(counts), base.weight.shape[1], generator=generator).to(BF16)
        y = together.apply(1, site, x, base)
        row = 0
        for i in order:
            for _ in range(counts[i]):
                torch.set_num_threads(1 + row % 2)
                lone = CpuDelta(build_route([places[i]], [1]), kernels=kernels)
                alone = lone.apply(1, site, x[row : row + 1], Given(base(x)[row : row + 1].clone()))
                assert torch.equal(alone[0], y[row]), (site, row)
                row += 1


def test_a_non_finite_row_does_not_poison_its_neighbours(kernels: CpuKernels) -> None:
    generator = torch.Generator().manual_seed(8)
    places = place([random_image(uniform_ranks(4), generator, BF16) for _ in range(3)], BF16)
    delta = CpuDelta(build_route([None, *places], [1, 1, 1, 1]), kernels=kernels)
    base = random_base("qkv", generator, BF16)
    x = torch.randn(4, 16, generator=generator).to(BF16)
    clean = delta.apply(0, "qkv", x, base)
    x[2] = float("nan")
    poisoned = delta.apply(0, "qkv", x, base)
    assert torch.equal(poisoned[[0, 1, 3]], clean[[0, 1, 3]])
    assert poisoned[2].isnan().all()


@dataclass(frozen=True)
class Problem:
    """x, y and the weights of a call; `members` holds (bt, first column of y, first column of the bridge)."""

    x: Tensor
    y: Tensor
    a: Tensor
    members: list[tuple[Tensor, int, int]]
    runs: list[tuple[int, int, int]]

    def answer(self) -> tuple[Tensor, Tensor]:
        """The definition, run by run, and how far the rounding of bridge and result may lead away from it."""
        found, spread = self.y.double(), torch.zeros(self.y.shape, dtype=torch.float64)
        for begin, count, position in self.runs:
            own = slice(begin, begin + count)
            bridge = self.x[own].double() @ self.a[position].double().T
            for bt, out_begin, rank_begin in self.members:
                columns = slice(out_begin, out_begin + bt.shape[2])
                own_bridge, weights = bridge[:, rank_begin : rank_begin + bt.shape[1]], bt[position].double()
                found[own, columns] += own_bridge @ weights
                spread[own, columns] += own_bridge.abs() @ weights.abs()
        return found, 2**-8 * (found.abs() + spread) * 1.1 + 1e-3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_matches_the_definition_and_touches_its_own_columns_alone(
    kernels: CpuKernels, data: st.DataObject
) -> None:
    in_dim = data.draw(st.integers(1, 140))
    members = data.draw(st.lists(st.tuples(st.integers(1, 21), st.integers(1, 75)), min_size=1, max_size=3))
    counts = data.draw(st.lists(st.integers(1, 37), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(BF16)

    num_ranks = sum(rank for rank, _ in members)
    a = normal(len(counts), num_ranks, in_dim)
    bts, out_begin, rank_begin = [], 1, 0
    for rank, width in members:
        bts.append((normal(len(counts), rank, width), out_begin, rank_begin))
        # one column between members, and before and after them, is nobody's
        out_begin, rank_begin = out_begin + width + 1, rank_begin + rank
    runs, begin = [], 1
    for i, count in enumerate(counts):
        runs.append((begin, count, len(counts) - 1 - i))
        begin += count + 1
    # wider than they need be: rows are a stride apart
    x, y = normal(begin, in_dim + 5)[:, :in_dim], normal(begin, out_begin + 3)
    before = y.clone()
    kernels.add_low_rank(LowRankSite(a, [LowRankMember(*bt) for bt in bts]), RunTable(runs), x, y)
    found, tolerance = Problem(x, before, a, bts, runs).answer()
    is_own = torch.zeros(y.shape, dtype=torch.bool)
    for first, count, _ in runs:
        for bt, column, _ in bts:
            is_own[first : first + count, column : column + bt.shape[2]] = True
    assert torch.equal(y[~is_own], before[~is_own])
    assert torch.all((y.double() - found).abs() <= tolerance)


def test_what_the_kernel_cannot_read_is_refused() -> None:
    a, bt = torch.zeros(2, 4, 8, dtype=BF16), torch.zeros(2, 4, 6, dtype=BF16)
    with pytest.raises(ValueError, match="float32"):
        LowRankSite(a.float(), [LowRankMember(bt, 0, 0)])
    with pytest.raises(ValueError, match="4 members"):
        LowRankSite(a, [LowRankMember(bt, 0, 0)] * 4)
    with pytest.raises(ValueError, match="contiguous"):
        LowRankSite(a, [LowRankMember(bt.transpose(1, 2), 0, 0)])

"""The fast CPU path against reference.py: mixed ranks, every popularity, rows without adapter, missing sites."""

import random

import pytest
import torch

from adapter_kernels.cpu import CpuDelta, _add_bags
from adapter_kernels.route import build_route
from adapter_kernels.slab import CAPACITY
from tests.kernels.cpu_steps import check_step, place, random_base
from tests.kernels.random_adapters import random_image, uniform_ranks

POPULARITY = ("distinct", "uniform", "zipf", "skewed", "identical")


def choose(kind: str, num_sequences: int, num_adapters: int, rng: random.Random) -> list[int | None]:
    weights = {
        "distinct": [1.0] * num_adapters,
        "uniform": [1.0] * num_adapters,
        "zipf": [1 / (i + 1) for i in range(num_adapters)],
        "skewed": [100.0, *([1.0] * (num_adapters - 1))],
        "identical": [1.0, *([0.0] * (num_adapters - 1))],
    }[kind]
    if kind == "distinct":
        return [i if i < num_adapters else None for i in range(num_sequences)]
    return [None if rng.random() < 0.2 else rng.choices(range(num_adapters), weights)[0] for _ in range(num_sequences)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", POPULARITY)
def test_mixed_ranks_in_one_step_match_the_reference(kind: str, dtype: torch.dtype) -> None:
    rng = random.Random(7)
    generator = torch.Generator().manual_seed(7)
    ranks = [1, 3, 8, 16, 64, 8, 8, 8, 17]
    images = [random_image(uniform_ranks(rank), generator, dtype) for rank in ranks]
    chosen = choose(kind, 24, len(images), rng)
    counts = [rng.choice([1, 1, 1, 2, 7, 17, 63]) for _ in chosen]
    check_step(images, chosen, counts, dtype)


def test_partial_targets_and_per_site_ranks_match_the_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    images = [
        random_image({(0, "q_proj"): 4, (0, "v_proj"): 2, (1, "down_proj"): 5}, generator),
        random_image({(1, "up_proj"): 3}, generator),
        random_image({(0, "k_proj"): 1, (0, "o_proj"): 9, (1, "gate_proj"): 2}, generator),
    ]
    check_step(images, [0, 1, 2, None, 0, 2, 1, 1], [1, 3, 1, 2, 12, 1, 1, 30], torch.float32)


def test_biases_are_added_once_per_row() -> None:
    generator = torch.Generator().manual_seed(4)
    biased = frozenset({(0, "q_proj"), (1, "down_proj"), (1, "k_proj")})
    ranks = {(0, "q_proj"): 4, (1, "down_proj"): 0, (1, "k_proj"): 2}
    images = [random_image(ranks, generator, biased=biased) for _ in range(4)]
    check_step(images, [0, 1, 2, 3, 3, None], [1, 1, 1, 1, 1, 1], torch.float32)
    check_step(images, [0, 2, 3, 3, None, 1], [1, 2, 20, 1, 1, 8], torch.float32)


def test_gaps_between_positions_read_nothing_of_the_idle_neighbour() -> None:
    generator = torch.Generator().manual_seed(5)
    images = [random_image(uniform_ranks(4), generator) for _ in range(12)]
    check_step(images, [0, 3, 4, 11], [1, 1, 2, 1], torch.float32)


def test_more_adapters_than_one_slab_holds_match_the_reference() -> None:
    generator = torch.Generator().manual_seed(6)
    images = [random_image(uniform_ranks(2), generator) for _ in range(CAPACITY * 2 + 3)]
    check_step(images, list(range(len(images))), [1] * len(images), torch.float32)


def test_a_non_finite_row_does_not_poison_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(8)
    images = [random_image(uniform_ranks(4), generator) for _ in range(3)]
    places = place(images, torch.float32)
    delta = CpuDelta(build_route([None, *places], [1, 1, 1, 1]))
    base = random_base("qkv", generator, torch.float32)
    x = torch.randn(4, 16, generator=generator)
    clean = delta.apply(0, "qkv", x, base)
    x[2] = float("nan")
    poisoned = delta.apply(0, "qkv", x, base)
    assert torch.equal(poisoned[[0, 1, 3]], clean[[0, 1, 3]])
    assert poisoned[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_run_expands_to_the_same_bits_alone_and_in_company(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    places = place([random_image(uniform_ranks(8), generator, dtype) for _ in range(5)], dtype)
    bt = places[0].slab.fused[0, "qkv"].members[0].bt
    assert bt is not None
    coefficients = torch.randn(12, 8, generator=generator).to(dtype)
    counts = [1, 5, 1, 3, 2]
    (group,) = build_route([*places], counts).groups
    together = torch.zeros(12, bt.shape[2], dtype=dtype)
    _add_bags(together, coefficients, bt, group)
    (lone,) = build_route([places[3]], [1]).groups
    for row in range(7, 10):
        alone = torch.zeros(1, bt.shape[2], dtype=dtype)
        own = coefficients[row : row + 1]
        _add_bags(alone, own, bt, lone)
        assert torch.equal(alone[0], together[row])
        torch.testing.assert_close(alone, own @ bt[places[3].position])

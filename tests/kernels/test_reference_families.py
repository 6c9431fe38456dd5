"""The definition itself against plain Python loops over single numbers, and against merged weights."""

import math

import pytest
import torch

from adapter_kernels.image import SiteTensors
from adapter_kernels.reference import gate_weights, site_output
from tests.kernels.random_adapters import SHAPES, Ops, random_adapter

Matrix = list[list[float]]


def site_of(site: str, ops: Ops, seed: int = 0) -> SiteTensors:
    image = random_adapter({(0, site): ops}, torch.Generator().manual_seed(seed))
    return image.site(image.rows[0])


def base_of(site: str, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows x, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    out_dim, in_dim = SHAPES[site]
    return (
        torch.randn(9, in_dim, generator=generator),
        torch.randn(out_dim, in_dim, generator=generator),
        torch.randn(out_dim, generator=generator),
    )


def dot(left: list[float], right: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def mixture_loops(x: list[float], gate: Matrix, ranks: tuple[int, ...], a: Matrix, bt: Matrix, ops: Ops) -> list[float]:
    """One token through a mixture, number by number."""
    logits = [dot(row, x) for row in gate]
    left = list(range(len(ranks)))
    chosen = []
    for _ in range(ops.top_k):
        best = left[0]
        for expert in left:
            if logits[expert] > logits[best]:
                best = expert
        chosen.append(best)
        left.remove(best)
    powers = [math.exp((logits[expert] - logits[chosen[0]]) / ops.temperature) for expert in chosen]
    y = [0.0] * len(bt[0])
    for expert, power in zip(chosen, powers, strict=True):
        begin = sum(ranks[:expert])
        for row in range(begin, begin + ranks[expert]):
            coefficient = dot(a[row], x) * power / sum(powers)
            y = [value + coefficient * weight for value, weight in zip(y, bt[row], strict=True)]
    return y


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 8, 2, 5)], ids=["equal", "unequal"])
def test_a_mixture_equals_loops_over_single_numbers(top_k: int, temperature: float, ranks: tuple[int, ...]) -> None:
    ops = Ops(ranks, top_k=top_k, temperature=temperature)
    site = site_of("v_proj", ops)
    x, weight, bias = base_of("v_proj")
    delta = site_output(x, weight, bias, site) - (x @ weight.T + bias)
    assert site.gate is not None
    for token in range(x.shape[0]):
        row: list[float] = x[token].tolist()
        expected = mixture_loops(row, site.gate.weight.tolist(), ranks, site.a.tolist(), site.bt.tolist(), ops)
        assert delta[token].tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("site_name", ["o_proj", "v_proj", "down_proj", "up_proj"])
def test_sparse_slices_equal_the_merged_weight(site_name: str) -> None:
    site = site_of(site_name, Ops(cols=3, rows=2))
    x, weight, bias = base_of(site_name)
    merged = weight.clone()
    assert site.cols is not None and site.rows is not None
    for j, channel in enumerate(site.cols.idx.tolist()):
        merged[:, channel] += site.cols.d[j]
    for j, channel in enumerate(site.rows.idx.tolist()):
        merged[channel] += site.rows.d[j]
    assert torch.allclose(site_output(x, weight, bias, site), x @ merged.T + bias, atol=1e-5)


def test_scales_frame_the_base_and_leave_bias_and_low_rank_alone() -> None:
    site = site_of("k_proj", Ops((2,), bias=True, out_scale=True, in_scale=True))
    x, weight, bias = base_of("k_proj")
    assert site.out_scale is not None and site.in_scale is not None and site.bias is not None
    merged = torch.diag(site.out_scale) @ weight @ torch.diag(site.in_scale) + site.bt.T @ site.a
    assert torch.allclose(site_output(x, weight, bias, site), x @ merged.T + bias + site.bias, atol=1e-5)


def test_equal_logits_go_to_the_lower_expert() -> None:
    site = site_of("q_proj", Ops((1, 1, 1, 1), top_k=2))
    assert site.gate is not None
    site.gate.weight[:] = torch.ones(4, 16)
    site.gate.weight[2] = 2.0
    assert [expert for expert, _ in gate_weights(torch.ones(16), site.gate)] == [2, 0]
    assert [expert for expert, _ in gate_weights(-torch.ones(16), site.gate)] == [0, 1]

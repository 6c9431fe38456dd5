"""The parts of a layer: packed against plain weights, and the norms' roundings against transformers' formulas."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from serve.model.families import NormKind
from serve.model.layers import PackedLinear, can_pack, make_norm
from serve.model.rope import RopeSpec
from serve.model.rotary import Rotary, rotate
from tests.model.paged_run import CPU


@pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="this CPU or torch build has no packed bf16 weights")
@pytest.mark.parametrize("num_rows", [1, 17, 133])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_equals_plain(num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(63, 40, generator=generator).bfloat16()
    bias = torch.randn(63, generator=generator).bfloat16() if has_bias else None
    x = torch.randn(num_rows, 40, generator=generator).bfloat16()
    exact = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    # one rounding of the result to bf16: 2^-9 of its size
    assert torch.allclose(PackedLinear(weight, bias)(x).float(), exact, rtol=2**-8, atol=1e-3)


def transformers_norm(x: Tensor, weight: Tensor, kind: NormKind) -> Tensor:
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    if kind is NormKind.CAST_THEN_SCALE:
        return weight * normed.to(x.dtype)
    scale = 1.0 + weight.float() if kind is NormKind.UNIT_OFFSET else weight.float()
    return (normed * scale).to(x.dtype)


@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_round_as_transformers_does(kind: NormKind, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(33, 72, generator=generator).to(dtype)
    weight = torch.randn(72, generator=generator).to(dtype)
    got, expected = make_norm(weight, 1e-6, kind)(x), transformers_norm(x, weight, kind)
    assert got.dtype == dtype
    assert (got != expected).float().mean() < 0.01 or torch.allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_rotation_depends_on_the_position_alone() -> None:
    spec = RopeSpec("default", 1e4, 16, 1.0, 1.0, 4.0, (), (), 64, None, 64)
    rotary = Rotary(spec, 64, torch.float32, CPU)
    heads = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([7, 0, 40, 3, 12])
    together = rotate(heads, rotary.rotation(positions))
    for t in range(5):
        alone = rotate(heads[t : t + 1], rotary.rotation(positions[t : t + 1]))
        assert torch.equal(together[t : t + 1], alone)
    assert torch.equal(together[1], heads[1])

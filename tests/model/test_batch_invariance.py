"""A row's linear layer has the same bits alone and in company: what "the same tokens alone and together" rests on."""

import pytest
import torch

from serve.model.layers import PackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_dim", "in_dim"), [(96, 64), (64, 172), (512, 896), (128, 4864)])
def test_a_row_keeps_its_bits_whatever_runs_beside_it(dtype: torch.dtype, out_dim: int, in_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = PackedLinear(torch.randn(out_dim, in_dim, generator=generator).to(dtype), None)
    rows = torch.randn(300, in_dim, generator=generator).to(dtype)
    expected = linear(rows[:1])
    for num_rows in (2, 3, 5, 7, 8, 9, 16, 17, 33, 64, 100, 300):
        for place in (0, num_rows // 2, num_rows - 1):
            order = torch.arange(num_rows)
            order[[0, place]] = order[[place, 0]]
            assert torch.equal(linear(rows[order])[place : place + 1], expected)

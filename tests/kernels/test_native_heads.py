"""The compiled placing of heads: the bits of the rotation and the cache write in torch, and nothing beside them."""

import pytest
import torch
from torch import Tensor

from adapter_kernels.native_cpu import CpuKernels
from adapter_kernels.paged_attention import kv_write
from serve.model.rotary import Rotation, rotate
from tests.kernels.compiled import kernels as kernels

BF16 = torch.bfloat16
NUM_BLOCKS, BLOCK_SIZE = 9, 4


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.mark.parametrize("num_rows", [1, 2, 33])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(14, 2, 64, 64), (6, 6, 128, 128), (3, 1, 80, 32), (4, 2, 10, 6), (5, 1, 256, 256), (2, 2, 96, 96)],
)
def test_heads_are_turned_and_written_as_torch_does(
    kernels: CpuKernels, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int
) -> None:
    num_qk, width = num_heads + num_kv_heads, (num_heads + 2 * num_kv_heads) * head_dim
    # as the projection gives them, and each row a little further apart than it is long
    qkv = _random(num_rows, width + 5, seed=1)[:, :width]
    heads = qkv[:, : num_qk * head_dim].view(num_rows, num_qk, head_dim)
    values = qkv[:, num_qk * head_dim :].view(num_rows, num_kv_heads, head_dim)
    angles = torch.randn(num_rows, 1, rotary_dim, generator=torch.Generator().manual_seed(2))
    rotation = Rotation(angles.cos().to(BF16), angles.sin().to(BF16))
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(3))[:num_rows]
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    k, v = _random(*shape, seed=4), _random(*shape, seed=5)
    expected_k, expected_v = k.clone(), v.clone()
    turned = rotate(heads, rotation)
    kv_write(turned[:, num_heads:], values, expected_k, expected_v, slots)
    before = values.clone()

    assert kernels.can_place(heads, values)
    flat = (k.view(-1, num_kv_heads, head_dim), v.view(-1, num_kv_heads, head_dim))
    kernels.place(heads, values, rotation.cos, rotation.sin, *flat, slots)
    assert torch.equal(heads[:, :num_heads], turned[:, :num_heads])
    assert torch.equal(k, expected_k) and torch.equal(v, expected_v)
    assert torch.equal(values, before)


def test_what_is_not_finite_stays_in_its_head(kernels: CpuKernels) -> None:
    heads, values = _random(3, 4, 64, seed=6), _random(3, 1, 64, seed=7)
    heads[1, 0, 3], heads[2, 3, 40] = float("nan"), float("inf")
    ones = torch.ones(3, 1, 64, dtype=BF16)
    k, v = torch.zeros(3, 1, 64, dtype=BF16), torch.zeros(3, 1, 64, dtype=BF16)
    kernels.place(heads, values, ones, ones, k, v, torch.arange(3))
    assert heads[1, 0].isnan().nonzero().flatten().tolist() == [3, 35]
    assert k[2, 0].isinf().nonzero().flatten().tolist() == [8, 40]
    assert heads.isfinite().sum() == heads.numel() - 3 and k[:2].isfinite().all() and v.isfinite().all()


def test_what_the_kernel_cannot_place_is_left_to_torch(kernels: CpuKernels) -> None:
    heads, values = torch.zeros(2, 4, 16, dtype=BF16), torch.zeros(2, 1, 16, dtype=BF16)
    assert kernels.can_place(heads, values)
    assert not kernels.can_place(heads.float(), values.float())
    assert not kernels.can_place(heads.transpose(1, 2), values)
    assert not kernels.can_place(heads, values.expand(2, 16, 16).transpose(1, 2))

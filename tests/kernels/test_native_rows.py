"""The compiled attention, gated activation and norm: torch's values, row by row, whatever lies beside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.native_cpu import CpuKernels
from adapter_kernels.paged_attention import paged_attention
from tests.kernels.compiled import kernels as kernels

BF16 = torch.bfloat16
BLOCK_SIZE = 4
# query heads, KV heads, head dim
HEADS = [(6, 2, 8), (14, 2, 64), (4, 4, 80), (9, 1, 33), (3, 1, 256), (70, 1, 16)]


class Cache:
    """A cache of sequences whose blocks are shuffled and whose other slots hold NaN."""

    def __init__(self, contexts: list[int], num_kv_heads: int, head_dim: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [-(-context // BLOCK_SIZE) for context in contexts]
        blocks = torch.randperm(sum(sizes) + 3, generator=generator).tolist()
        self.tables = [[blocks.pop() for _ in range(size)] for size in sizes]
        self.k = torch.full((sum(sizes) + 3, BLOCK_SIZE, num_kv_heads, head_dim), float("nan"), dtype=BF16)
        self.v = self.k.clone()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for table, context in zip(self.tables, contexts, strict=True):
            slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context)]
            for cache, kept in ((self.k, self.keys), (self.v, self.values)):
                new = torch.randn(context, num_kv_heads, head_dim, generator=generator).to(BF16)
                cache.view(-1, num_kv_heads, head_dim)[slots] = new
                kept.append(new)


def attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """softmax(scale q . k) v over the positions in sight, fp64."""
    begin = 0 if window is None else max(0, k.shape[0] - window)
    group = q.shape[0] // k.shape[1]
    k, v = (t[begin:].double().repeat_interleave(group, 1) for t in (k, v))
    weights = torch.einsum("he,phe->hp", q.double(), k).mul(scale).softmax(1)
    return torch.einsum("hp,phe->he", weights, v)


def assert_attended(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> None:
    """Check one row [H, E]: weights and result are each rounded to bf16, by a relative 2**-8 at most."""
    truth = attend_one(q, k, v, scale, window)
    bound = 2**-8 * (attend_one(q, k, v.abs(), scale, window) + truth.abs()) + 1e-5
    assert ((out.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_decodes_attend_as_a_softmax_does(
    kernels: CpuKernels, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    contexts = [1, 2, 5, 63, 64, 65, 130, 333]
    cache = Cache(contexts, num_kv_heads, head_dim, 0)
    plan = AttentionPlan.build([c - 1 for c in contexts], [1] * len(contexts), cache.tables, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(1)
    # as the model gives them: query heads beside key heads
    q = torch.randn(len(contexts), num_heads + num_kv_heads, head_dim, generator=generator).to(BF16)[:, :num_heads]
    out = paged_attention(q, cache.k, cache.v, plan, scale=0.2, window=window, soft_cap=None, kernels=kernels)
    for i in range(len(contexts)):
        assert_attended(out[i], q[i], cache.keys[i], cache.values[i], 0.2, window)


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_each_token_of_a_chunk_sees_what_lies_before_it(
    kernels: CpuKernels, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    starts, lengths = [0, 61, 7], [67, 5, 1]
    contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
    cache = Cache(contexts, num_kv_heads, head_dim, 12)
    plan = AttentionPlan.build(starts, lengths, cache.tables, BLOCK_SIZE)
    q = torch.randn(sum(lengths), num_heads, head_dim, generator=torch.Generator().manual_seed(13)).to(BF16)
    out = paged_attention(q, cache.k, cache.v, plan, scale=0.2, window=window, soft_cap=None, kernels=kernels)
    row = 0
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        for position in range(start, start + length):
            seen = cache.keys[i][: position + 1], cache.values[i][: position + 1]
            assert_attended(out[row], q[row], *seen, 0.2, window)
            row += 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 1, 2, 7, 70])), min_size=1, max_size=6))
def test_a_token_has_the_same_bits_alone_and_in_any_chunk_of_any_step(
    kernels: CpuKernels, sequences: list[tuple[int, int]]
) -> None:
    starts, lengths = [start for start, _ in sequences], [length for _, length in sequences]
    cache = Cache([start + length for start, length in sequences], 2, 16, 3)
    plan = AttentionPlan.build(starts, lengths, cache.tables, BLOCK_SIZE)
    q = torch.randn(sum(lengths), 6, 16, generator=torch.Generator().manual_seed(2)).to(BF16)
    options = {"scale": 0.25, "window": None, "soft_cap": None}
    together = paged_attention(q, cache.k, cache.v, plan, kernels=kernels, **options)  # type: ignore[arg-type]
    in_torch = paged_attention(q, cache.k, cache.v, plan, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(together, in_torch, rtol=2**-6, atol=5e-3)
    row = 0
    for i, length in enumerate(lengths):
        for offset in range(length):
            lone = AttentionPlan.build([starts[i] + offset], [1], [cache.tables[i]], BLOCK_SIZE)
            alone = paged_attention(q[row : row + 1], cache.k, cache.v, lone, kernels=kernels, **options)  # type: ignore[arg-type]
            assert torch.equal(alone[0], together[row])
            row += 1


def test_a_broken_sequence_keeps_its_nan_to_itself(kernels: CpuKernels) -> None:
    cache = Cache([9, 70], 2, 16, 4)
    plan = AttentionPlan.build([8, 69], [1, 1], cache.tables, BLOCK_SIZE)
    q = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(5)).to(BF16)
    options = {"scale": 0.25, "window": None, "soft_cap": None, "kernels": kernels}
    clean = paged_attention(q, cache.k, cache.v, plan, **options)  # type: ignore[arg-type]
    cache.k[cache.tables[1][16], 1] = float("nan")
    poisoned = paged_attention(q, cache.k, cache.v, plan, **options)  # type: ignore[arg-type]
    assert torch.equal(poisoned[0], clean[0])
    assert poisoned[1].isnan().all()


def test_steep_scores_keep_to_the_largest(kernels: CpuKernels) -> None:
    cache = Cache([200], 1, 32, 6)
    plan = AttentionPlan.build([199], [1], cache.tables, BLOCK_SIZE)
    q = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(7)).to(BF16)
    out = paged_attention(q, cache.k, cache.v, plan, scale=400.0, window=None, soft_cap=None, kernels=kernels)
    truth = attend_one(q[0], cache.keys[0], cache.values[0], 400.0, None)
    torch.testing.assert_close(out[0].double(), truth, rtol=2**-7, atol=1e-3)


def test_what_the_kernel_cannot_attend_is_left_to_torch(kernels: CpuKernels) -> None:
    q = torch.zeros(2, 4, 16, dtype=BF16)
    assert kernels.can_attend(q, None)
    assert not kernels.can_attend(q, 30.0)
    assert not kernels.can_attend(q.float(), None)
    assert not kernels.can_attend(q.transpose(1, 2), None)
    assert not kernels.can_attend(torch.zeros(2, 4, 320, dtype=BF16), None)


@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (1, 31), (3, 33), (32, 896), (70, 1000)])
def test_silu_mul_rounds_as_torch_does(kernels: CpuKernels, num_rows: int, width: int) -> None:
    gate_up = torch.randn(num_rows, 2 * width + 3, generator=torch.Generator().manual_seed(8)).mul(6).to(BF16)
    gate_up = gate_up[:, : 2 * width]
    expected = functional.silu(gate_up[:, :width]) * gate_up[:, width:]
    found = kernels.silu_mul(gate_up)
    # e^x is a unit of fp32 off in places, which now and then tips a rounding
    assert (found != expected).float().mean() < 1e-3
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_silu_mul_of_the_ends_of_the_range(kernels: CpuKernels) -> None:
    gate = torch.tensor([[0.0, -0.0, float("inf"), float("-inf"), float("nan"), -200.0, 200.0, 1e-30, -1e-30, -87.5]])
    gate_up = torch.cat((gate, torch.full_like(gate, 3.0)), 1).to(BF16)
    expected = functional.silu(gate_up[:, :10]) * gate_up[:, 10:]
    torch.testing.assert_close(kernels.silu_mul(gate_up), expected, rtol=2**-7, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (2, 31), (3, 33), (40, 896), (7, 4096)])
def test_rms_norm_rounds_as_torch_does(kernels: CpuKernels, num_rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(num_rows, width + 2, generator=generator).mul(5).to(BF16)[:, :width]
    weight = torch.randn(width, generator=generator).to(BF16)
    expected = functional.rms_norm(x, (width,), None, 1e-6) * weight
    found = kernels.rms_norm(x, weight, 1e-6)
    assert (found != expected).float().mean() < 1e-2
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=0)
    assert kernels.rms_norm(torch.zeros(1, width, dtype=BF16), weight, 1e-6).eq(0).all()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 5000])
def test_argmax_is_torchs(kernels: CpuKernels, width: int) -> None:
    generator = torch.Generator().manual_seed(11)
    # few distinct values: ties in most rows
    logits = torch.randint(-9, 9, (40, width + 1), generator=generator).to(BF16)[:, :width]
    logits[7, width // 2] = float("nan")
    logits[8, width - 1], logits[9, 0] = float("nan"), float("inf")
    logits[10], logits[11] = float("-inf"), -0.0
    values, tokens = kernels.argmax(logits)
    best, first = logits.max(dim=1)
    torch.testing.assert_close(values, best, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(tokens, first)


def test_rows_have_the_same_bits_alone_and_in_company(kernels: CpuKernels) -> None:
    generator = torch.Generator().manual_seed(10)
    x, weight = torch.randn(37, 1024, generator=generator).to(BF16), torch.ones(1024, dtype=BF16)
    gated, normed = kernels.silu_mul(x), kernels.rms_norm(x, weight, 1e-5)
    for row in range(37):
        assert torch.equal(kernels.silu_mul(x[row : row + 1])[0], gated[row])
        assert torch.equal(kernels.rms_norm(x[row : row + 1], weight, 1e-5)[0], normed[row])

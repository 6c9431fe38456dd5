"""Paged attention against a token-by-token softmax over the sequence's own positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.paged_attention import kv_write, paged_attention

BLOCK_SIZE, NUM_BLOCKS, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM = 4, 24, 2, 6, 8
SCALE = 0.3
STEPS = {
    "decodes": ([5, 0, 9, 3], [1, 1, 1, 1]),
    "one prefill": ([0], [11]),
    "chunks": ([8, 0], [9, 17]),
    "mixed": ([5, 0, 9, 3, 2], [1, 6, 3, 1, 2]),
}


def tables(contexts: list[int]) -> list[list[int]]:
    blocks = list(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist())
    return [[blocks.pop() for _ in range(-(-context // BLOCK_SIZE))] for context in contexts]


def attend_one(q: Tensor, k: Tensor, v: Tensor, window: int | None, soft_cap: float | None) -> Tensor:
    first = 0 if window is None else max(0, k.shape[0] - window)
    out = torch.empty_like(q)
    for head in range(NUM_HEADS):
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        scores = (k[first:, kv_head] @ q[head]) * SCALE
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        out[head] = scores.softmax(0) @ v[first:, kv_head]
    return out


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_paged_attention_equals_a_softmax_per_token(step: str, window: int | None, soft_cap: float | None) -> None:
    starts, lengths = STEPS[step]
    generator = torch.Generator().manual_seed(0)
    contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
    block_tables = tables(contexts)
    plan = AttentionPlan.build(starts, lengths, block_tables, BLOCK_SIZE)
    # unwritten and foreign slots hold NaN: reading one shows at once
    k_cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM), float("nan"))
    v_cache = k_cache.clone()
    keys = [torch.randn(c, NUM_KV_HEADS, HEAD_DIM, generator=generator) for c in contexts]
    values = [torch.randn(c, NUM_KV_HEADS, HEAD_DIM, generator=generator) for c in contexts]
    for table, k, v, start in zip(block_tables, keys, values, starts, strict=True):
        for position in range(start):
            k_cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = k[position]
            v_cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = v[position]
    new_k = torch.cat([k[start:] for k, start in zip(keys, starts, strict=True)])
    new_v = torch.cat([v[start:] for v, start in zip(values, starts, strict=True)])
    kv_write(new_k, new_v, k_cache, v_cache, plan.slot_mapping)
    q = torch.randn(sum(lengths), NUM_HEADS, HEAD_DIM, generator=generator)
    out = paged_attention(q, k_cache, v_cache, plan, scale=SCALE, window=window, soft_cap=soft_cap)
    row = 0
    for k, v, start, length in zip(keys, values, starts, lengths, strict=True):
        for position in range(start, start + length):
            expected = attend_one(q[row], k[: position + 1], v[: position + 1], window, soft_cap)
            assert torch.allclose(out[row], expected, atol=1e-5)
            row += 1


def test_positions_and_slots_follow_the_block_tables() -> None:
    plan = AttentionPlan.build([5, 0], [1, 3], [[3, 4], [5]], 4)
    assert plan.positions.tolist() == [5, 0, 1, 2]
    assert plan.slot_mapping.tolist() == [17, 20, 21, 22]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([1, 1, 1, 2, 7])), min_size=1, max_size=6), st.integers(1, 7)
)
def test_a_plan_reads_and_writes_where_the_tables_say(sequences: list[tuple[int, int]], block_size: int) -> None:
    starts, lengths = [start for start, _ in sequences], [length for _, length in sequences]
    # no two blocks are alike, and each table has one block more than it needs
    block_tables = [
        [100 * index + 3 * block for block in range((start + length) // block_size + 2)]
        for index, (start, length) in enumerate(sequences)
    ]
    plan = AttentionPlan.build(starts, lengths, block_tables, block_size)

    def slot(index: int, position: int) -> int:
        return block_tables[index][position // block_size] * block_size + position % block_size

    runs = [(i, p) for i, (start, length) in enumerate(sequences) for p in range(start, start + length)]
    assert plan.num_tokens == len(runs)
    assert plan.positions.tolist() == [position for _, position in runs]
    assert plan.slot_mapping.tolist() == [slot(index, position) for index, position in runs]
    alone = [index for index, length in enumerate(lengths) if length == 1]
    begins = [sum(lengths[:index]) for index in range(len(lengths))]
    assert [(chunk.begin, chunk.end, chunk.start, chunk.slots.tolist()) for chunk in plan.chunks] == [
        (begins[i], begins[i] + n, s, [slot(i, p) for p in range(s + n)]) for i, (s, n) in enumerate(sequences) if n > 1
    ]
    if plan.decodes is None:
        assert not alone
        return
    longest = -(-max(starts[index] + 1 for index in alone) // 16) * 16
    assert plan.decodes.max_context == longest and plan.decodes.is_whole_step == (len(alone) == len(lengths))
    assert plan.decodes.rows.tolist() == [begins[index] for index in alone]
    assert plan.decodes.context_lengths.tolist() == [starts[index] + 1 for index in alone]
    assert plan.decodes.slots.view(len(alone), longest).tolist() == [
        [slot(index, position if position <= starts[index] else 0) for position in range(longest)] for index in alone
    ]

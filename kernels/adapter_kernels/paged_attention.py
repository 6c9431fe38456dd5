"""Attention over the paged KV cache on the CPU, and the write of new keys and values.

One call per layer serves all decoding sequences, and each prefill chunk is a call of its own: by the compiled kernel,
which reads the cache in place, or else in torch, where decodes are padded. There a mask of minus infinity on scores of
the sequence's own slots excludes padding and future positions: a stale or non-finite value of another sequence is never
read in either.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttendedRows, AttentionPlan, Chunk, DecodeGroup
from adapter_kernels.native_cpu import CpuKernels


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys and values into their cache slots, in place.

    `k_cache.view(-1, K, E)[slot_mapping[t]] = k[t]`, the same for v.

    Args:
        k, v: [T, K, E]. k_cache, v_cache: [num_blocks, block_size, K, E]. slot_mapping: [T] int64, no value twice.
    """
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    kernels: CpuKernels | None = None,
) -> Tensor:
    """Attend each token to its own sequence's positions up to itself.

    out[t, h] = sum_p softmax_p(cap(scale * q[t, h] . k[p, h // (H / K)])) v[p], over p in (pos - window, pos].

    Args:
        q: [T, H, E]; H a multiple of K. k_cache, v_cache: [num_blocks, block_size, K, E], this step's rows written.
        window: positions a token sees, itself included; None: all.
        soft_cap: c of `c * tanh(score / c)`; None: off.
        kernels: the compiled ones, for what they can do; None: torch.
    Returns:
        [T, H, E] in q's dtype; scores and softmax in fp32 where a cap is applied, else as torch's attention does.
    """
    flat_k = k_cache.view(-1, *k_cache.shape[2:])
    flat_v = v_cache.view(-1, *v_cache.shape[2:])
    if kernels is not None and kernels.can_attend(q, soft_cap):
        out = torch.empty(q.shape, dtype=q.dtype)
        parts: tuple[AttendedRows, ...] = plan.chunks
        for rows in parts if plan.decodes is None else (plan.decodes, *parts):
            kernels.attend(q, flat_k, flat_v, out, rows, scale, window)
        return out
    if plan.decodes is not None and plan.decodes.is_whole_step:
        return _decode(q, flat_k, flat_v, plan.decodes, scale, window, soft_cap)
    out = torch.empty(q.shape, dtype=q.dtype)
    if plan.decodes is not None:
        own = plan.decodes.rows
        out[own] = _decode(q[own], flat_k, flat_v, plan.decodes, scale, window, soft_cap)
    for chunk in plan.chunks:
        out[chunk.begin : chunk.end] = _prefill(
            q[chunk.begin : chunk.end], flat_k, flat_v, chunk, scale, window, soft_cap
        )
    return out


def _decode(
    q: Tensor, k: Tensor, v: Tensor, group: DecodeGroup, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    shape = (num_seqs, group.max_context, num_kv_heads, head_dim)
    keys = k.index_select(0, group.slots).view(shape).transpose(1, 2)  # [G, K, C, E]
    values = v.index_select(0, group.slots).view(shape).transpose(1, 2)
    # heads of one KV head become query rows: keys are read once, never repeated
    queries = q.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = _cached(group.masks, window, lambda: _decode_mask(group, window, q.dtype))
    out = _attend(queries, keys, values, mask, scale, soft_cap)
    return out.reshape(num_seqs, num_heads, head_dim)


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    keys = k.index_select(0, chunk.slots).transpose(0, 1)[None]  # [1, K, C, E]
    values = v.index_select(0, chunk.slots).transpose(0, 1)[None]
    mask = _cached(chunk.masks, window, lambda: _prefill_mask(chunk, window, group, q.dtype))
    queries = q.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    queries = queries.reshape(1, num_kv_heads, group * num_tokens, head_dim)
    out = _attend(queries, keys, values, mask, scale, soft_cap)
    out = out.view(num_kv_heads, group, num_tokens, head_dim).permute(2, 0, 1, 3)
    return out.reshape(num_tokens, num_heads, head_dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    if soft_cap is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)).mul_(scale)
    scores = scores.div_(soft_cap).tanh_().mul_(soft_cap).add_(mask)
    return torch.matmul(scores.softmax(-1), v.float()).to(q.dtype)


def _cached(masks: dict[int | None, Tensor], window: int | None, build: Callable[[], Tensor]) -> Tensor:
    mask = masks.get(window)
    if mask is None:
        mask = masks[window] = build()
    return mask


def _decode_mask(group: DecodeGroup, window: int | None, dtype: torch.dtype) -> Tensor:
    """[G, 1, 1, C]: minus infinity on padding and on positions before the window."""
    columns = torch.arange(group.max_context)
    blocked = columns >= group.context_lengths[:, None]
    if window is not None:
        blocked = blocked | (columns < group.context_lengths[:, None] - window)
    return _additive(blocked, dtype)[:, None, None, :]


def _prefill_mask(chunk: Chunk, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
    """[group * T, C]: minus infinity on later positions and on those before the window, for each head of the group."""
    rows = torch.arange(chunk.start, chunk.start + chunk.end - chunk.begin)[:, None]
    columns = torch.arange(chunk.slots.shape[0])
    blocked = columns > rows
    if window is not None:
        blocked = blocked | (columns <= rows - window)
    return _additive(blocked, dtype).repeat(group, 1)


def _additive(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, float("-inf"))

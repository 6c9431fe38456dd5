"""Paged attention and the cache write in plain fp32 torch: the definition that the fast paths are tested against.

One row at a time, over the row's own positions only. Invariant: a row's result depends on its own sequence; a cache
slot that is not one of its positions is never read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def attend_row(
    q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None, soft_cap: float | None
) -> Tensor:
    """Attend one row to all given positions, of which it is the last.

    out[h] = sum_p softmax_p(cap(scale * q[h] . k[p, h // (H / K)])) v[p, h // (H / K)], over the last `window`
    positions, cap(x) = soft_cap * tanh(x / soft_cap).

    Args:
        q: [H, E]. keys, values: [positions, K, E], at least one position.
    Returns:
        [H, E] fp32.
    """
    num_kv_heads = keys.shape[1]
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    queries = q.float().view(num_kv_heads, -1, q.shape[-1])
    scores = torch.einsum("kge,pke->kgp", queries, keys.float()) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.einsum("kgp,pke->kge", scores.softmax(-1), values.float()).reshape(q.shape)


def paged_attention_rows(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    contexts: Sequence[int],
    tables: Sequence[Sequence[int]],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """Attend each row to the first `contexts[t]` positions of its sequence; a row of context 0 becomes zeros.

    Args:
        q: [T, H, E]. k_cache, v_cache: [num_blocks, block_size, K, E].
        contexts: per row, positions it sees, itself included. tables: per row, the block ids of its sequence.
    Returns:
        [T, H, E] fp32.
    """
    block_size = k_cache.shape[1]
    out = torch.zeros(q.shape)
    for row, (context, table) in enumerate(zip(contexts, tables, strict=True)):
        if context == 0:
            continue
        slots = [table[position // block_size] * block_size + position % block_size for position in range(context)]
        keys, values = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]
        out[row] = attend_row(q[row], keys, values, scale=scale, window=window, soft_cap=soft_cap)
    return out


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write each row's key and value, in place: k_cache.view(-1, K, E)[slot] = k[t]; slot -1: nothing is written."""
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache.flatten(0, 1)[slot] = k[row]
            v_cache.flatten(0, 1)[slot] = v[row]

"""Self-attention of one layer: fused qkv, optional norms of q and k, rotation, paged cache, output projection.

Owns the layout of the fused projection (q | k | v); the attention itself lies in `adapter_kernels`. Invariant: keys
and values of the step are in the cache before any row of the step attends.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.delta import AdapterDelta, ModelDelta
from adapter_kernels.native_cpu import cpu_kernels
from adapter_kernels.paged_attention import kv_write, paged_attention
from serve.model.adapted_linear import AdaptedLinear
from serve.model.adapted_norm import AdaptedNorm
from serve.model.kv_cache import KvCache
from serve.model.layers import Norm
from serve.model.rotary import Rotation, rotate
from serve.model.spec import ModelSpec


class SplitHeads(Protocol):
    """Queries and keys as they leave the projection [T, (H + K) * E] -> heads [T, H + K, E]."""

    def __call__(self, qk: Tensor, model: ModelDelta | None) -> Tensor: ...


class PlainHeads:
    """No norm between projection and heads."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self._num_heads = num_heads
        self._head_dim = head_dim

    def __call__(self, qk: Tensor, model: ModelDelta | None) -> Tensor:
        return qk.view(-1, self._num_heads, self._head_dim)


class HeadNormHeads:
    """One norm over each head, its weight [H + K, E] holding q's and k's."""

    def __init__(self, layer: int, num_query_heads: int, num_heads: int, head_dim: int, norm: Norm) -> None:
        self._layer = layer
        self._num_query_heads = num_query_heads
        self._num_heads = num_heads
        self._head_dim = head_dim
        self._norm = norm

    def __call__(self, qk: Tensor, model: ModelDelta | None) -> Tensor:
        heads = qk.view(-1, self._num_heads, self._head_dim)
        normed = self._norm(heads)
        if model is not None:
            first_key = self._num_query_heads
            model.norm(self._layer, "q_norm", heads[:, :first_key], normed[:, :first_key], self._norm)
            model.norm(self._layer, "k_norm", heads[:, first_key:], normed[:, first_key:], self._norm)
        return normed


class FullNormHeads:
    """One norm over all query heads together and one over all key heads, before they are split."""

    def __init__(self, query_width: int, head_dim: int, q_norm: AdaptedNorm, k_norm: AdaptedNorm) -> None:
        self._query_width = query_width
        self._head_dim = head_dim
        self._q_norm = q_norm
        self._k_norm = k_norm

    def __call__(self, qk: Tensor, model: ModelDelta | None) -> Tensor:
        queries = self._q_norm(qk[:, : self._query_width], model)
        keys = self._k_norm(qk[:, self._query_width :], model)
        return torch.cat((queries, keys), dim=-1).view(qk.shape[0], -1, self._head_dim)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What every layer of a step shares; `rotations[i]` belongs to `ModelSpec.ropes[i]`."""

    plan: AttentionPlan
    kv: KvCache
    adapters: AdapterDelta | None
    # of `adapters`: what they do outside the linear layers
    model: ModelDelta | None
    rotations: tuple[Rotation, ...]


class Attention:
    """The attention block of one layer."""

    def __init__(
        self, spec: ModelSpec, layer: int, qkv: AdaptedLinear, o: AdaptedLinear, split_heads: SplitHeads
    ) -> None:
        self._layer = layer
        self._qkv = qkv
        self._o = o
        self._split_heads = split_heads
        self._num_heads = spec.dims.num_attention_heads
        self._head_dim = spec.dims.head_dim
        self._qk_width = (spec.dims.num_attention_heads + spec.dims.num_key_value_heads) * spec.dims.head_dim
        self._window = spec.layers[layer].window
        self._rope_index = spec.layers[layer].rope_index
        self._scale = spec.attention_scale
        self._soft_cap = spec.attention_soft_cap

    def __call__(self, x: Tensor, step: StepInputs) -> Tensor:
        """x [T, D] -> [T, D]; writes this step's keys and values."""
        qkv = self._qkv(x, step.adapters)
        heads = self._split_heads(qkv[:, : self._qk_width], step.model)
        values = qkv[:, self._qk_width :].view(x.shape[0], -1, self._head_dim)
        k_cache, v_cache = step.kv.k[self._layer], step.kv.v[self._layer]
        queries = self._place(heads, values, k_cache, v_cache, step)
        if step.model is not None:
            step.model.write_prefix(self._layer, k_cache, v_cache)
        attended = paged_attention(
            queries,
            k_cache,
            v_cache,
            step.plan,
            scale=self._scale,
            window=self._window,
            soft_cap=self._soft_cap,
            kernels=cpu_kernels(),
        )
        return self._o(attended.reshape(x.shape[0], -1), step.adapters)

    def _place(self, heads: Tensor, values: Tensor, k_cache: Tensor, v_cache: Tensor, step: StepInputs) -> Tensor:
        """Turn the heads, which may be changed, and write keys and values; return the queries [T, H, E]."""
        slots = step.plan.slot_mapping
        rotation = None if self._rope_index is None else step.rotations[self._rope_index]
        kernels = cpu_kernels()
        if rotation is not None and kernels is not None and kernels.can_place(heads, values):
            flat = (values.shape[1], self._head_dim)
            caches = k_cache.view(-1, *flat), v_cache.view(-1, *flat)
            kernels.place(heads, values, rotation.cos, rotation.sin, *caches, slots)
            return heads[:, : self._num_heads]
        if rotation is not None:
            heads = rotate(heads, rotation)
        kv_write(heads[:, self._num_heads :], values, k_cache, v_cache, slots)
        return heads[:, : self._num_heads]

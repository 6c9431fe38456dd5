"""Self-attention of one layer on the GPU: qkv projection, its sink, paged attention, output projection.

Owns the layout of the fused projection (q | k | v) and the two ways to finish it: the fused sink, and for OLMo2's norm
over all heads separate ops. Invariant: keys and values of the step are in the cache before any row attends.
"""

from typing import Protocol

import torch
from torch import Tensor

from adapter_kernels.gpu.kv_write import kv_write
from adapter_kernels.gpu.paged_decode import paged_decode
from adapter_kernels.gpu.paged_prefill import paged_prefill
from adapter_kernels.gpu.qkv_sink import qkv_sink
from adapter_kernels.gpu.sink_inputs import QkNormWeights, QkvDims
from serve.model.fused_sites import Bridged, FusedSite, WithDelta
from serve.model.fused_step import FusedStep
from serve.model.fused_weights import FullQkNorm
from serve.model.rotary import Rotation, rotate
from serve.model.spec import ModelSpec


class FinishHeads(Protocol):
    """What stands between the qkv projection and attention."""

    def __call__(self, projected: Bridged, step: FusedStep) -> None:
        """Fill `step.buffers.queries` and write the step's keys and values into the cache."""
        ...


class SunkHeads:
    """Delta, norm per head, rotation and cache write in one launch."""

    def __init__(self, spec: ModelSpec, layer: int, norm: QkNormWeights | None) -> None:
        dims = spec.dims
        self._dims = QkvDims(dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim)
        self._layer = layer
        self._rope_index = spec.layers[layer].rope_index
        self._norm = norm

    def __call__(self, projected: Bridged, step: FusedStep) -> None:
        """Fill `step.buffers.queries` and write the step's keys and values into the cache."""
        rotation = None if self._rope_index is None else step.rotations[self._rope_index]
        qkv_sink(
            projected.y,
            projected.adapters,
            q_out=step.buffers.queries,
            k_cache=step.kv.k[self._layer],
            v_cache=step.kv.v[self._layer],
            slot_mapping=step.inputs.slot_mapping,
            cos=None if rotation is None else rotation.cos,
            sin=None if rotation is None else rotation.sin,
            norm=self._norm,
            dims=self._dims,
            config=step.config("qkv_sink", projected.y.shape[1]),
        )


class FullNormHeads:
    """One norm over all query heads together and one over all key heads: delta added to y first, then torch's ops."""

    def __init__(self, spec: ModelSpec, layer: int, norm: FullQkNorm, qkv: FusedSite) -> None:
        dims = spec.dims
        q_width, kv_width = spec.qk_norm_widths()
        self._widths = [q_width, kv_width, kv_width]
        self._head_dim = dims.head_dim
        self._layer = layer
        self._rope_index = spec.layers[layer].rope_index
        self._norm = norm
        self._qkv = qkv

    def __call__(self, projected: Bridged, step: FusedStep) -> None:
        """Fill `step.buffers.queries` and write the step's keys and values into the cache; `projected.y` is changed."""
        if projected.adapters is not None:
            self._qkv.expand(projected.adapters, projected.y, step, accumulate=True)
        q, k, v = torch.split(projected.y, self._widths, dim=1)
        queries = self._turned(self._norm.q(q), step)
        keys = self._turned(self._norm.k(k), step)
        step.buffers.queries.copy_(queries)
        k_cache, v_cache = step.kv.k[self._layer], step.kv.v[self._layer]
        kv_write(keys, self._heads(v), k_cache, v_cache, step.inputs.slot_mapping)

    def _turned(self, rows: Tensor, step: FusedStep) -> Tensor:
        heads = self._heads(rows)
        if self._rope_index is None:
            return heads
        flat = step.rotations[self._rope_index]
        return rotate(heads, Rotation(flat.cos[:, None], flat.sin[:, None]))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], -1, self._head_dim)


class FusedAttention:
    """The attention block of one layer."""

    def __init__(self, spec: ModelSpec, layer: int, qkv: FusedSite, o: FusedSite, finish_heads: FinishHeads) -> None:
        self._layer = layer
        self._qkv = qkv
        self._o = o
        self._finish_heads = finish_heads
        self._head_dim = spec.dims.head_dim
        self._window = spec.layers[layer].window
        self._scale = spec.attention_scale
        self._soft_cap = spec.attention_soft_cap

    def __call__(self, x: Tensor, step: FusedStep) -> WithDelta:
        """x [T, D] -> y [T, D] and its delta; writes this step's keys and values."""
        self._finish_heads(self._qkv.project(x, step), step)
        self._attend(step)
        return self._o.project_with_delta(step.buffers.attended.view(x.shape[0], -1), step)

    def _attend(self, step: FusedStep) -> None:
        queries, attended = step.buffers.queries, step.buffers.attended
        k_cache, v_cache = step.kv.k[self._layer], step.kv.v[self._layer]
        if step.inputs.decodes is not None:
            paged_decode(
                queries,
                k_cache,
                v_cache,
                step.inputs.decodes,
                attended,
                scale=self._scale,
                window=self._window,
                soft_cap=self._soft_cap,
                workspace=step.decode_workspace,
                config=step.config("paged_decode", self._head_dim),
            )
        if step.inputs.prefills is not None:
            paged_prefill(
                queries,
                k_cache,
                v_cache,
                step.inputs.prefills,
                attended,
                scale=self._scale,
                window=self._window,
                soft_cap=self._soft_cap,
                config=step.config("paged_prefill", self._head_dim),
            )

"""One decoder layer as the GPU runs it: four GEMMs, and between them one fused op each.

Owns the order of launches and where each delta is added; the kernels lie in `adapter_kernels.gpu`. Invariant: a layer
leaves in `step.buffers.normed` what the next one reads, so every norm rides on the residual add before it.
"""

from torch import Tensor

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.add_norm import add_norm
from adapter_kernels.gpu.sink_inputs import NormWeights
from adapter_kernels.gpu.swiglu_sink import swiglu_sink
from serve.model.fused_attention import FinishHeads, FullNormHeads, FusedAttention, SunkHeads
from serve.model.fused_sites import FusedSite, WithDelta
from serve.model.fused_step import FusedStep
from serve.model.fused_weights import FullQkNorm, FusedLayerWeights
from serve.model.spec import ModelSpec


class FusedMlp:
    """down(activation(gate) * up) on the fused gate | up projection."""

    def __init__(self, gate_up: FusedSite, down: FusedSite, activation: str) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: Tensor, step: FusedStep) -> WithDelta:
        """x [T, D] -> y [T, D] and its delta."""
        projected = self._gate_up.project(x, step)
        activated = step.buffers.activated
        swiglu_sink(
            projected.y,
            projected.adapters,
            activation=self._activation,
            out=activated,
            config=step.config("swiglu_sink", activated.shape[1]),
        )
        return self._down.project_with_delta(activated, step)


class FusedLayer:
    """Attention and MLP; after each the residual add, with the norms on both sides of it, in one launch."""

    def __init__(self, spec: ModelSpec, layer: int, weights: FusedLayerWeights, next_norm: NormWeights | None) -> None:
        """Wire one layer.

        Args:
            next_norm: what stands before the next layer's attention, or after the last layer; None: nothing.
        """
        sites = {name: _site(spec, layer, name, weights) for name in FUSED_SITES}
        finish = _finish_heads(spec, layer, weights, sites["qkv"])
        self._attention = FusedAttention(spec, layer, sites["qkv"], sites["o"], finish)
        self._mlp = FusedMlp(sites["gate_up"], sites["down"], spec.activation)
        self._attention_norms = weights.attention_norms
        self._mlp_norms = weights.mlp_norms
        self._next_norm = next_norm
        self._residual_scale = spec.residual_scale

    def __call__(self, x: Tensor, step: FusedStep) -> None:
        """Advance the residual stream x [T, D] in place; read and leave its norm in `step.buffers.normed`."""
        normed = step.buffers.normed
        block = self._attention(x if self._attention_norms.before is None else normed, step)
        self._add(x, block, self._attention_norms.after, self._mlp_norms.before, step)
        block = self._mlp(x if self._mlp_norms.before is None else normed, step)
        self._add(x, block, self._mlp_norms.after, self._next_norm, step)

    def _add(
        self, x: Tensor, block: WithDelta, after: NormWeights | None, before: NormWeights | None, step: FusedStep
    ) -> None:
        add_norm(
            x,
            block.y,
            delta=block.delta,
            residual_scale=self._residual_scale,
            after=after,
            before=before,
            x_out=x,
            normed=None if before is None else step.buffers.normed,
        )


def _site(spec: ModelSpec, layer: int, name: str, weights: FusedLayerWeights) -> FusedSite:
    widths = tuple(spec.dims.site_shape(member)[0] for member in FUSED_SITES[name])
    return FusedSite(weights.sites[name], layer, name, widths)


def _finish_heads(spec: ModelSpec, layer: int, weights: FusedLayerWeights, qkv: FusedSite) -> FinishHeads:
    if isinstance(weights.qk_norm, FullQkNorm):
        return FullNormHeads(spec, layer, weights.qk_norm, qkv)
    return SunkHeads(spec, layer, weights.qk_norm)

"""The base's tensors as the GPU launch plan wants them: plain fused weights, norms with their rounding, shared tables.

Owns which tensors a `FusedDecoder` holds and the form the sinks ask for; launches nothing. Invariant: each weight is
on the device once: a tied head is the token table itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.gpu.sink_inputs import NormWeights, QkNormWeights
from serve.model.families import NormKind, QkNorm
from serve.model.layers import Norm, make_norm
from serve.model.spec import ModelSpec
from serve.model.weight_names import BlockNormNames, block_norm_names
from serve.model.weight_source import SiteWeights, WeightSource


@dataclass(frozen=True, slots=True)
class BlockNormWeights:
    """Norms before and after a block; None where the family has none."""

    before: NormWeights | None
    after: NormWeights | None


@dataclass(frozen=True, slots=True)
class FullQkNorm:
    """One norm over all query heads together and one over all key heads (OLMo2), which no sink computes."""

    q: Norm
    k: Norm


@dataclass(frozen=True, slots=True)
class FusedLayerWeights:
    """One layer: weights by fused site, norms, and the norm of queries and keys where the family has one."""

    sites: dict[str, SiteWeights]
    attention_norms: BlockNormWeights
    mlp_norms: BlockNormWeights
    qk_norm: QkNormWeights | FullQkNorm | None


@dataclass(frozen=True, slots=True)
class FusedWeights:
    """The whole base; `lm_head` is `embedding` where the weights are tied."""

    embedding: Tensor
    lm_head: Tensor
    final_norm: NormWeights
    layers: tuple[FusedLayerWeights, ...]


def read_fused_weights(source: WeightSource) -> FusedWeights:
    """Take every tensor from its source, one after the other, into its place."""
    spec = source.spec
    embedding = source.embedding()
    layers = tuple(_layer(source, layer) for layer in range(spec.dims.num_hidden_layers))
    final_norm = _norm(spec, source.final_norm())
    head = source.lm_head()
    return FusedWeights(embedding, embedding if head is None else head, final_norm, layers)


def _layer(source: WeightSource, layer: int) -> FusedLayerWeights:
    attention, mlp = block_norm_names(source.spec.norm_placement)
    return FusedLayerWeights(
        sites={site: source.site(layer, site) for site in ("qkv", "o", "gate_up", "down")},
        attention_norms=_block_norms(source, layer, attention),
        mlp_norms=_block_norms(source, layer, mlp),
        qk_norm=_qk_norm(source, layer),
    )


def _block_norms(source: WeightSource, layer: int, names: BlockNormNames) -> BlockNormWeights:
    def norm(path: str | None) -> NormWeights | None:
        if path is None:
            return None
        return _norm(source.spec, source.norm(layer, path, source.spec.dims.hidden_size))

    return BlockNormWeights(norm(names.before), norm(names.after))


def _qk_norm(source: WeightSource, layer: int) -> QkNormWeights | FullQkNorm | None:
    spec = source.spec
    if spec.qk_norm is QkNorm.NONE:
        return None
    q_width, k_width = spec.qk_norm_widths()
    q = source.norm(layer, "self_attn.q_norm", q_width)
    k = source.norm(layer, "self_attn.k_norm", k_width)
    if spec.qk_norm is QkNorm.FULL:
        return FullQkNorm(make_norm(q, spec.norm_eps, spec.norm_kind), make_norm(k, spec.norm_eps, spec.norm_kind))
    return QkNormWeights(_scale(spec, q), _scale(spec, k), spec.norm_eps, _casts_first(spec))


def _norm(spec: ModelSpec, weight: Tensor) -> NormWeights:
    return NormWeights(_scale(spec, weight), spec.norm_eps, _casts_first(spec))


def _casts_first(spec: ModelSpec) -> bool:
    return spec.norm_kind is NormKind.CAST_THEN_SCALE


def _scale(spec: ModelSpec, weight: Tensor) -> Tensor:
    """Bring a norm's weight into the dtype that its rounding asks for, Gemma's `1 +` folded in."""
    match spec.norm_kind:
        case NormKind.CAST_THEN_SCALE:
            return weight
        case NormKind.SCALE_THEN_CAST:
            return weight.to(torch.float32)
        case NormKind.UNIT_OFFSET:
            return weight.to(torch.float32) + 1.0

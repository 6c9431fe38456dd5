"""From a checkpoint to a `Decoder`: every tensor straight to its place in a fused and, where possible, packed weight.

Owns the checkpoint's names and the order of loading. Invariant: peak memory is the model plus one fused site: a site
is read, packed, and its plain form dropped before the next is read; nothing is loaded until all names and shapes fit.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from serve.model.adapted_linear import AdaptedLinear
from serve.model.attention import Attention, FullNormHeads, PlainHeads, SplitHeads
from serve.model.checkpoint import Checkpoint
from serve.model.decoder import BlockNorms, Decoder, DecoderLayer, Mlp
from serve.model.families import NormPlacement, QkNorm
from serve.model.layers import Linear, Norm, PlainLinear, can_pack, make_activation, make_linear, make_norm
from serve.model.rotary import Rotary
from serve.model.spec import ModelSpec
from serve.model.weight_names import WeightNames


def load_decoder(
    model_dir: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    max_model_len: int | None = None,
) -> Decoder:
    """Load the weights of a model folder.

    Args:
        dtype: what to compute in; the checkpoint is cast on the way.
        max_model_len: longest sequence that will be served (None: `spec.max_position_embeddings`); beyond a longrope
            model's original length it selects the long factors, for short sequences too.
    Raises:
        StartError: missing, unexpected or wrongly shaped tensors, by name; quantised or damaged files.
    """
    checkpoint = Checkpoint.open(model_dir)
    names = WeightNames.find(spec, checkpoint)
    return _Loader(spec, checkpoint, names, dtype, device).load(max_model_len or spec.max_position_embeddings)


@dataclass(frozen=True, slots=True)
class _Loader:
    spec: ModelSpec
    checkpoint: Checkpoint
    names: WeightNames
    dtype: torch.dtype
    device: torch.device

    def load(self, max_model_len: int) -> Decoder:
        embedding = self._tensor([self.names.embedding])
        return Decoder(
            spec=self.spec,
            embedding=embedding,
            ropes=tuple(Rotary(rope, max_model_len, self.dtype, self.device) for rope in self.spec.ropes),
            layers=tuple(self._layer(i) for i in range(self.spec.dims.num_hidden_layers)),
            final_norm=self._norm(self.names.final_norm),
            lm_head=self._lm_head(embedding),
        )

    def _layer(self, layer: int) -> DecoderLayer:
        mlp = Mlp(self._site(layer, "gate_up"), self._site(layer, "down"), make_activation(self.spec.activation))
        attention = Attention(
            self.spec, layer, self._site(layer, "qkv"), self._site(layer, "o"), self._split_heads(layer)
        )
        attention_norms, mlp_norms = self._block_norms(layer)
        return DecoderLayer(attention, mlp, attention_norms, mlp_norms, self.spec.residual_scale)

    def _site(self, layer: int, site: str) -> AdaptedLinear:
        weight = self._tensor(self.names.site(layer, site, "weight"))
        bias_names = self.names.site(layer, site, "bias")
        bias = self._tensor(bias_names) if bias_names else None
        return AdaptedLinear(make_linear(weight, bias), layer, site)

    def _lm_head(self, embedding: Tensor) -> Linear:
        if self.names.lm_head is not None:
            return make_linear(self._tensor([self.names.lm_head]), None)
        if can_pack(self.dtype, self.device):
            # the lookup needs the plain table, the product the packed one: tied weights cost their bytes twice
            return make_linear(embedding, None)
        return PlainLinear(embedding, None)

    def _split_heads(self, layer: int) -> SplitHeads:
        dims, kind = self.spec.dims, self.spec.norm_kind
        num_heads = dims.num_attention_heads + dims.num_key_value_heads
        if self.spec.qk_norm is QkNorm.NONE:
            return PlainHeads(num_heads, dims.head_dim, None)
        q_norm = self._tensor([self.names.layer(layer, "self_attn.q_norm")])
        k_norm = self._tensor([self.names.layer(layer, "self_attn.k_norm")])
        eps = self.spec.norm_eps
        if self.spec.qk_norm is QkNorm.FULL:
            width = dims.num_attention_heads * dims.head_dim
            return FullNormHeads(width, dims.head_dim, make_norm(q_norm, eps, kind), make_norm(k_norm, eps, kind))
        weights = [q_norm.expand(dims.num_attention_heads, -1), k_norm.expand(dims.num_key_value_heads, -1)]
        return PlainHeads(num_heads, dims.head_dim, make_norm(torch.cat(weights), eps, kind))

    def _block_norms(self, layer: int) -> tuple[BlockNorms, BlockNorms]:
        def norm(name: str) -> Norm:
            return self._norm(self.names.layer(layer, name))

        match self.spec.norm_placement:
            case NormPlacement.PRE:
                return (
                    BlockNorms(norm("input_layernorm"), None),
                    BlockNorms(norm("post_attention_layernorm"), None),
                )
            case NormPlacement.POST:
                return (
                    BlockNorms(None, norm("post_attention_layernorm")),
                    BlockNorms(None, norm("post_feedforward_layernorm")),
                )
            case NormPlacement.BOTH:
                return (
                    BlockNorms(norm("input_layernorm"), norm("post_attention_layernorm")),
                    BlockNorms(norm("pre_feedforward_layernorm"), norm("post_feedforward_layernorm")),
                )

    def _norm(self, name: str) -> Norm:
        return make_norm(self._tensor([name]), self.spec.norm_eps, self.spec.norm_kind)

    def _tensor(self, names: list[str]) -> Tensor:
        """Read tensors side by side along dim 0 into one new one."""
        shapes = [self.checkpoint.tensors[name].shape for name in names]
        rows = sum(shape[0] for shape in shapes)
        fused = torch.empty((rows, *shapes[0][1:]), dtype=self.dtype, device=self.device)
        begin = 0
        for name, shape in zip(names, shapes, strict=True):
            self.checkpoint.read_into(name, fused[begin : begin + shape[0]])
            begin += shape[0]
        return fused

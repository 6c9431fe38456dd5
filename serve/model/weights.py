"""From a checkpoint to a `Decoder`: every tensor straight to its place in a fused and, where possible, packed weight.

Owns the checkpoint's names and the order of loading. Invariant: peak memory is the model plus one fused site: a site
is read, packed, and its plain form dropped before the next is read; nothing is loaded until all names and shapes fit.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from serve.model.adapted_linear import AdaptedLinear
from serve.model.adapted_norm import AdaptedNorm
from serve.model.attention import Attention, FullNormHeads, HeadNormHeads, PlainHeads, SplitHeads
from serve.model.checkpoint import Checkpoint
from serve.model.decoder import BlockNorms, Decoder, DecoderLayer, Mlp
from serve.model.families import QkNorm
from serve.model.layers import Linear, PlainLinear, can_pack, make_activation, make_gated, make_linear, make_norm
from serve.model.rotary import Rotary
from serve.model.spec import ModelSpec
from serve.model.token_table import PlainTable, TokenTable, tie
from serve.model.weight_names import WeightNames, block_norm_names
from serve.model.weight_source import CheckpointWeights, WeightSource


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
    source = CheckpointWeights(spec, checkpoint, names, dtype, device)
    return _Loader(spec, source).load(max_model_len or spec.max_position_embeddings)


@dataclass(frozen=True, slots=True)
class _Loader:
    spec: ModelSpec
    source: WeightSource

    def load(self, max_model_len: int) -> Decoder:
        source = self.source
        # first: while it is packed the table is there twice, and nothing else yet
        table, head = self._tables()
        return Decoder(
            spec=self.spec,
            table=table,
            ropes=tuple(Rotary(rope, max_model_len, source.dtype, source.device) for rope in self.spec.ropes),
            layers=tuple(self._layer(i) for i in range(self.spec.dims.num_hidden_layers)),
            final_norm=self._adapted(source.final_norm(), -1, "norm"),
            lm_head=head,
        )

    def _layer(self, layer: int) -> DecoderLayer:
        name = self.spec.activation
        gate_up, down = self._site(layer, "gate_up"), self._site(layer, "down")
        mlp = Mlp(layer, gate_up, down, make_activation(name), make_gated(name))
        attention = Attention(
            self.spec, layer, self._site(layer, "qkv"), self._site(layer, "o"), self._split_heads(layer)
        )
        attention_norms, mlp_norms = self._block_norms(layer)
        return DecoderLayer(attention, mlp, attention_norms, mlp_norms, self.spec.residual_scale)

    def _site(self, layer: int, site: str) -> AdaptedLinear:
        weights = self.source.site(layer, site)
        return AdaptedLinear(make_linear(weights.weight, weights.bias), layer, site)

    def _tables(self) -> tuple[TokenTable, Linear]:
        """Make the lookup of tokens and the output head, which may be one table."""
        table, head = self.source.embedding(), self.source.lm_head()
        if head is not None:
            return PlainTable(table), make_linear(head, None)
        if can_pack(self.source.dtype, self.source.device):
            return tie(table)
        return PlainTable(table), PlainLinear(table, None)

    def _split_heads(self, layer: int) -> SplitHeads:
        dims = self.spec.dims
        num_heads = dims.num_attention_heads + dims.num_key_value_heads
        if self.spec.qk_norm is QkNorm.NONE:
            return PlainHeads(num_heads, dims.head_dim)
        q_width, k_width = self.spec.qk_norm_widths()
        q_norm = self.source.norm(layer, "self_attn.q_norm", q_width)
        k_norm = self.source.norm(layer, "self_attn.k_norm", k_width)
        if self.spec.qk_norm is QkNorm.FULL:
            norms = self._adapted(q_norm, layer, "q_norm"), self._adapted(k_norm, layer, "k_norm")
            return FullNormHeads(q_width, dims.head_dim, *norms)
        weights = [q_norm.expand(dims.num_attention_heads, -1), k_norm.expand(dims.num_key_value_heads, -1)]
        norm = make_norm(torch.cat(weights), self.spec.norm_eps, self.spec.norm_kind)
        return HeadNormHeads(layer, dims.num_attention_heads, num_heads, dims.head_dim, norm)

    def _block_norms(self, layer: int) -> tuple[BlockNorms, BlockNorms]:
        attention, mlp = block_norm_names(self.spec.norm_placement)
        return (
            BlockNorms(self._norm(layer, attention.before), self._norm(layer, attention.after)),
            BlockNorms(self._norm(layer, mlp.before), self._norm(layer, mlp.after)),
        )

    def _norm(self, layer: int, path: str | None) -> AdaptedNorm | None:
        if path is None:
            return None
        return self._adapted(self.source.norm(layer, path, self.spec.dims.hidden_size), layer, path)

    def _adapted(self, weight: Tensor, layer: int, name: str) -> AdaptedNorm:
        return AdaptedNorm(make_norm(weight, self.spec.norm_eps, self.spec.norm_kind), layer, name)

"""The names and shapes a checkpoint must have for a spec, and the check that it has them and no others.

Owns the spelling of tensor names per family (fused or split projections, prefix of multimodal checkpoints). Invariant:
after `WeightNames.find` every name it answers exists with the shape the decoder needs.
"""

from dataclasses import dataclass

from adapter_kernels.delta import FUSED_SITES
from adapters_store.base import SITE_PATHS
from serve.errors import StartError
from serve.model.checkpoint import Checkpoint
from serve.model.families import NormPlacement, QkNorm
from serve.model.spec import ModelSpec

# where the text model's tensors hang: plain, then multimodal checkpoints of transformers 4 and 5
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_LM_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
_FUSED_PATHS = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}

# harmless leftovers: buffers that old versions saved, and the parts of a multimodal model that see images
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias")
_IGNORED_PARTS = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class BlockNormNames:
    """Modules of the norms before and after a block; None where the family has none."""

    before: str | None
    after: str | None


# (attention, mlp)
_NORMS = {
    NormPlacement.PRE: (BlockNormNames("input_layernorm", None), BlockNormNames("post_attention_layernorm", None)),
    NormPlacement.POST: (
        BlockNormNames(None, "post_attention_layernorm"),
        BlockNormNames(None, "post_feedforward_layernorm"),
    ),
    NormPlacement.BOTH: (
        BlockNormNames("input_layernorm", "post_attention_layernorm"),
        BlockNormNames("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}


def block_norm_names(placement: NormPlacement) -> tuple[BlockNormNames, BlockNormNames]:
    """Name a layer's norms: (of the attention block, of the MLP block)."""
    return _NORMS[placement]


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of a spec's tensors in one checkpoint; `lm_head` is None when the embedding serves for it."""

    spec: ModelSpec
    prefix: str
    embedding: str
    lm_head: str | None

    @classmethod
    def find(cls, spec: ModelSpec, checkpoint: Checkpoint) -> "WeightNames":
        """Match the checkpoint against the spec.

        Raises:
            StartError: tensors are missing, unexpected, or of another shape than the config says.
        """
        prefix = next((p for p in _PREFIXES if f"{p}norm.weight" in checkpoint.tensors), _PREFIXES[0])
        embedding, lm_head = _tables(checkpoint, f"{prefix}embed_tokens.weight", is_tied=spec.dims.tie_word_embeddings)
        names = cls(spec, prefix, embedding, lm_head)
        names._check(checkpoint)
        return names

    @property
    def final_norm(self) -> str:
        """The norm after the last layer."""
        return f"{self.prefix}norm.weight"

    def layer(self, layer: int, path: str) -> str:
        """The weight of one module of one layer."""
        return f"{self.prefix}layers.{layer}.{path}.weight"

    def site(self, layer: int, site: str, kind: str) -> list[str]:
        """The tensors that make up a fused site, in order of rows; `kind` is "weight" or "bias" (empty when none)."""
        if kind == "bias" and not self.spec.has_bias(site):
            return []
        paths = [SITE_PATHS[part] for part in FUSED_SITES[site]]
        if self.spec.has_fused_checkpoint and site in _FUSED_PATHS:
            paths = [_FUSED_PATHS[site]]
        return [f"{self.prefix}layers.{layer}.{path}.{kind}" for path in paths]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        dims = self.spec.dims
        shapes: dict[str, tuple[int, ...]] = {
            self.embedding: (dims.vocab_size, dims.hidden_size),
            self.final_norm: (dims.hidden_size,),
        }
        if self.lm_head is not None:
            shapes[self.lm_head] = (dims.vocab_size, dims.hidden_size)
        for layer in range(dims.num_hidden_layers):
            for block in block_norm_names(self.spec.norm_placement):
                for norm in (block.before, block.after):
                    if norm is not None:
                        shapes[self.layer(layer, norm)] = (dims.hidden_size,)
            shapes.update(self._qk_norm_shapes(layer))
            for site in FUSED_SITES:
                shapes.update(self._site_shapes(layer, site))
        return shapes

    def _qk_norm_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        if self.spec.qk_norm is QkNorm.NONE:
            return {}
        q_width, k_width = self.spec.qk_norm_widths()
        return {
            self.layer(layer, "self_attn.q_norm"): (q_width,),
            self.layer(layer, "self_attn.k_norm"): (k_width,),
        }

    def _site_shapes(self, layer: int, site: str) -> dict[str, tuple[int, ...]]:
        parts = [self.spec.dims.site_shape(part) for part in FUSED_SITES[site]]
        weights = self.site(layer, site, "weight")
        rows = [out for out, _ in parts] if len(weights) == len(parts) else [sum(out for out, _ in parts)]
        width = parts[0][1]
        shapes: dict[str, tuple[int, ...]] = {name: (n, width) for name, n in zip(weights, rows, strict=True)}
        biases = self.site(layer, site, "bias")
        if biases:
            shapes.update({name: (n,) for name, n in zip(biases, rows, strict=True)})
        return shapes

    def _check(self, checkpoint: Checkpoint) -> None:
        expected = self._shapes()
        missing = [name for name in expected if name not in checkpoint.tensors]
        unexpected = [name for name in checkpoint.tensors if name not in expected and not self._is_ignored(name)]
        if missing or unexpected:
            raise StartError(
                f"the checkpoint does not fit {self.spec.architecture}: "
                + "; ".join(_listing(kind, names) for kind, names in _kinds(missing, unexpected))
            )
        for name, shape in expected.items():
            found = checkpoint.tensors[name].shape
            if found != shape:
                raise StartError(f"tensor {name} has shape {list(found)}; config.json asks for {list(shape)}")

    def _is_ignored(self, name: str) -> bool:
        if name.endswith(_IGNORED_SUFFIXES) or (self.lm_head is None and name in _LM_HEADS):
            return True
        is_multimodal = self.spec.architecture.endswith("ForConditionalGeneration")
        return is_multimodal and name.removeprefix("model.").startswith(_IGNORED_PARTS)


def _tables(checkpoint: Checkpoint, embedding: str, *, is_tied: bool) -> tuple[str, str | None]:
    """Name the token table and the head; None: the table is the head."""
    head = next((name for name in _LM_HEADS if name in checkpoint.tensors), None)
    if not is_tied:
        return embedding, head or _LM_HEADS[0]
    if head is None:
        return embedding, None
    if embedding not in checkpoint.tensors:
        # some writers keep the other one of a tied pair
        return head, None
    return embedding, None if checkpoint.are_equal(head, embedding) else head


def _kinds(missing: list[str], unexpected: list[str]) -> list[tuple[str, list[str]]]:
    return [(kind, names) for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]


def _listing(kind: str, names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{kind} {', '.join(names[:shown])}{more}"

"""What an adapter does outside the linear layers of the decoder, read out of its image.

Owns the tensors of the model ops as the CPU path holds them: copies in the model's dtype, so that the image's bytes
need not stay. Invariant: no view reaches outside the image, no index names a token that the base lacks, no norm stands
where the base has none, and a prompt and a prefix are never both there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapter_kernels.gate import Mixture
from adapter_kernels.image import WAY_OUT, AdapterImage, ImageError
from adapter_kernels.model_rows import GateRow, ModelRows, ModelShapes, NormRow, TokenRow

# where replaced token rows may act
_TARGETS = ((), ("embed",), ("lm_head",), ("embed", "lm_head"), ("both",))


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Replaced rows of a token table: e[i] [H] stands for token idx[i]; idx [n] int64 increases."""

    idx: Tensor
    e: Tensor


@dataclass(frozen=True, slots=True)
class EmbedLowrank:
    """A low rank on the token table: x += at[t] @ bt; at [V, r], bt [r, H]."""

    at: Tensor
    bt: Tensor


@dataclass(frozen=True, slots=True)
class KvPrefix:
    """Keys and values of n positions before a sequence, [layers, n, K, E]; the keys are used as they are."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class HeadSite:
    """What acts on the output head h: (h A.T) BT + bias; a [R, H], bt [R, V], bias [V]."""

    a: Tensor
    bt: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class MlpGate:
    """The gate of one layer's MLP: logits of weight [E, H] and bias [E], both fp32; see `GateRow`."""

    weight: Tensor
    bias: Tensor | None
    mixture: Mixture
    is_ffn_moe: bool


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """The tensors of one adapter's model ops; what it does not have is None or empty.

    `norms` by (layer, norm), fp32; `gates` by layer.
    """

    norms: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    embed_rows: TokenRows | None = None
    head_rows: TokenRows | None = None
    embed_lowrank: EmbedLowrank | None = None
    prompt_embeds: Tensor | None = None
    kv_prefix: KvPrefix | None = None
    gates: dict[int, MlpGate] = field(default_factory=dict)
    head: HeadSite | None = None

    @property
    def acts_on_head(self) -> bool:
        """Does it change the product of the output head?"""
        return self.head is not None or self.head_rows is not None

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it puts before a sequence."""
        if self.prompt_embeds is not None:
            return self.prompt_embeds.shape[0]
        return 0 if self.kv_prefix is None else self.kv_prefix.k.shape[1]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All floating-point tensors with a name for messages; a tensor that acts in two places comes once."""
        for (layer, norm), weight in self.norms.items():
            yield (norm if layer < 0 else f"layers.{layer}.{norm}"), weight
        if self.embed_rows is not None:
            yield "the rows of embed_tokens", self.embed_rows.e
        if self.head_rows is not None and (self.embed_rows is None or self.head_rows.e is not self.embed_rows.e):
            yield "the rows of lm_head", self.head_rows.e
        if self.embed_lowrank is not None:
            yield from (("embed_tokens", self.embed_lowrank.at), ("embed_tokens", self.embed_lowrank.bt))
        if self.prompt_embeds is not None:
            yield "the prompt", self.prompt_embeds
        if self.kv_prefix is not None:
            yield from (("the prefix", self.kv_prefix.k), ("the prefix", self.kv_prefix.v))
        for layer, gate in self.gates.items():
            yield from ((f"layers.{layer}.mlp", part) for part in (gate.weight, gate.bias) if part is not None)
        if self.head is not None:
            parts = (self.head.a, self.head.bt, self.head.bias)
            yield from (("lm_head", part) for part in parts if part is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.weights())


@dataclass(frozen=True, slots=True)
class ModelImage:
    """An image with the offset table of its model ops."""

    image: AdapterImage
    rows: ModelRows
    shapes: ModelShapes

    def read(self, dtype: torch.dtype) -> ModelTensors:
        """Copy the model ops out, cast to the model's dtype (norms and gates to fp32).

        Raises:
            ImageError: an offset is unaligned or reaches past the end, or the table contradicts itself.
        """
        rows = self.rows
        if rows.prompt_embeds is not None and rows.kv_prefix is not None:
            raise ImageError(f"the adapter has both a prompt and a prefix; {WAY_OUT}")
        targets = tuple(row.target for row in rows.token_rows)
        if targets not in _TARGETS:
            raise ImageError(f"token rows act on {list(targets)}, which no adapter does; {WAY_OUT}")
        tokens = {row.target: self._token_rows(row, dtype) for row in rows.token_rows}
        hidden = self.shapes.hidden_size
        prompt = rows.prompt_embeds
        return ModelTensors(
            norms={(row.layer, row.norm): self._norm(row) for row in rows.norms},
            embed_rows=tokens.get("embed", tokens.get("both")),
            head_rows=tokens.get("lm_head", tokens.get("both")),
            embed_lowrank=self._embed_lowrank(dtype),
            prompt_embeds=None
            if prompt is None
            else self._view(prompt.offset, self.image.dtype, prompt.count, hidden, to=dtype),
            kv_prefix=self._kv_prefix(dtype),
            gates={row.layer: self._gate(row) for row in rows.gates},
            head=self._head(dtype),
        )

    def _norm(self, row: NormRow) -> Tensor:
        width = self.shapes.norm_widths.get(row.norm)
        name = row.norm if row.layer < 0 else f"layers.{row.layer}.{row.norm}"
        if width is None or (row.norm == "norm") != (row.layer == -1):
            known = ", ".join(self.shapes.norm_widths)
            raise ImageError(f"the adapter replaces {name}; of this base {known} can be: train other norms, or a LoRA")
        return self._view(row.offset, torch.float32, width)

    def _token_rows(self, row: TokenRow, dtype: torch.dtype) -> TokenRows:
        idx = self._view(row.idx_offset, torch.int32, row.count, to=torch.int64)
        # a step must not meet an index that torch refuses: it would fail the other rows too
        is_known = bool(((idx >= 0) & (idx < self.shapes.vocab_size)).all())
        if not is_known or not bool((idx[1:] > idx[:-1]).all()):
            raise ImageError(
                f"token ids at byte {row.idx_offset} are not increasing below {self.shapes.vocab_size}; {WAY_OUT}"
            )
        return TokenRows(idx, self._view(row.e_offset, self.image.dtype, row.count, self.shapes.hidden_size, to=dtype))

    def _embed_lowrank(self, dtype: torch.dtype) -> EmbedLowrank | None:
        row, shapes = self.rows.embed_lowrank, self.shapes
        if row is None:
            return None
        return EmbedLowrank(
            at=self._view(row.at_offset, self.image.dtype, shapes.vocab_size, row.rank, to=dtype),
            bt=self._view(row.bt_offset, self.image.dtype, row.rank, shapes.hidden_size, to=dtype),
        )

    def _kv_prefix(self, dtype: torch.dtype) -> KvPrefix | None:
        row, shapes = self.rows.kv_prefix, self.shapes
        if row is None:
            return None
        shape = (shapes.num_layers, row.count, shapes.num_kv_heads, shapes.head_dim)
        return KvPrefix(
            k=self._view(row.k_offset, self.image.dtype, *shape, to=dtype),
            v=self._view(row.v_offset, self.image.dtype, *shape, to=dtype),
        )

    def _gate(self, row: GateRow) -> MlpGate:
        num_experts, options = row.num_experts, row.options
        is_known = options.are_known and not (row.is_ffn_moe and options.mix == "rank")
        if not 1 <= row.top_k <= num_experts or not row.temperature > 0 or not is_known:
            raise ImageError(
                f"layers.{row.layer}.mlp: no gate chooses {row.top_k} of {num_experts} experts at temperature "
                f"{row.temperature} by {options}; {WAY_OUT}"
            )
        weight = self._view(row.weight_offset, self.image.dtype, num_experts, self.shapes.hidden_size, to=torch.float32)
        bias = None if row.bias_offset is None else self._view(row.bias_offset, torch.float32, num_experts)
        mixture = Mixture.build((1,) * num_experts, row.top_k, row.temperature, 0, options)
        return MlpGate(weight, bias, mixture, row.is_ffn_moe)

    def _head(self, dtype: torch.dtype) -> HeadSite | None:
        row, shapes = self.rows.head, self.shapes
        if row is None:
            return None
        bias = row.bias_offset
        return HeadSite(
            a=self._view(row.a_offset, self.image.dtype, row.rank, shapes.hidden_size, to=dtype),
            bt=self._view(row.bt_offset, self.image.dtype, row.rank, shapes.vocab_size, to=dtype),
            bias=None if bias is None else self._view(bias, self.image.dtype, shapes.vocab_size, to=dtype),
        )

    def _view(self, offset: int, stored: torch.dtype, *shape: int, to: torch.dtype | None = None) -> Tensor:
        """Copy a tensor out, in its stored dtype or another."""
        rows = self.image.view(offset, math.prod(shape[:-1]), shape[-1], stored)
        return rows.view(shape).to(to or stored, copy=True)


def model_not_finite(name: str, dtype: torch.dtype) -> str:
    """Say that a weight of a model op is NaN or infinite in the model's dtype, and the way out."""
    return (
        f"{name}: a weight is not finite in {dtype}, this server's dtype; serve with --dtype float32 or bfloat16, or "
        "rescale the adapter"
    )

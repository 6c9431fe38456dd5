"""The decoder: token ids and a step's plan in, hidden states and logits out; one class for every family.

Owns the order of a layer's parts and the multipliers between them; the parts come from `weights.load_decoder`.
Invariant: each row depends on its own sequence alone: nothing here reads the number or kind of the other rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.attention_plan import AttentionPlan
from adapter_kernels.delta import AdapterDelta, ModelDelta
from serve.model.adapted_linear import AdaptedLinear
from serve.model.adapted_norm import AdaptedNorm
from serve.model.attention import Attention, StepInputs
from serve.model.kv_cache import KvCache
from serve.model.layers import Activation, Gated, Linear
from serve.model.rotary import Rotary
from serve.model.spec import ModelSpec
from serve.model.token_table import TokenTable


class Mlp:
    """down(activation(gate) * up) on the fused gate | up projection."""

    def __init__(
        self, layer: int, gate_up: AdaptedLinear, down: AdaptedLinear, activation: Activation, gated: Gated
    ) -> None:
        self._layer = layer
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self._gated = gated

    def __call__(self, x: Tensor, step: StepInputs) -> Tensor:
        """x [T, D] -> [T, D]."""
        gate_up = self._gate_up(x, step.adapters)
        if step.model is not None:
            mixed = step.model.mlp(
                self._layer, x, gate_up, self._activation, lambda activated: self._down(activated, step.adapters)
            )
            if mixed is not None:
                return mixed
        return self._down(self._gated(gate_up), step.adapters)


@dataclass(frozen=True, slots=True)
class BlockNorms:
    """Norms before and after a block; None where the family has none."""

    before: AdaptedNorm | None
    after: AdaptedNorm | None


class DecoderLayer:
    """Attention and MLP, each between its norms, each added to the residual stream."""

    def __init__(
        self, attention: Attention, mlp: Mlp, attention_norms: BlockNorms, mlp_norms: BlockNorms, residual_scale: float
    ) -> None:
        self._attention = attention
        self._mlp = mlp
        self._attention_norms = attention_norms
        self._mlp_norms = mlp_norms
        self._residual_scale = residual_scale

    def __call__(self, x: Tensor, step: StepInputs) -> Tensor:
        """x [T, D] -> [T, D]; `x` is left as it was."""
        norms, model = self._attention_norms, step.model
        h = self._attention(x if norms.before is None else norms.before(x, model), step)
        x = torch.add(x, h if norms.after is None else norms.after(h, model), alpha=self._residual_scale)
        norms = self._mlp_norms
        h = self._mlp(x if norms.before is None else norms.before(x, model), step)
        return torch.add(x, h if norms.after is None else norms.after(h, model), alpha=self._residual_scale)


class Decoder:
    """The frozen base model."""

    def __init__(
        self,
        spec: ModelSpec,
        table: TokenTable,
        ropes: tuple[Rotary, ...],
        layers: tuple[DecoderLayer, ...],
        final_norm: AdaptedNorm,
        lm_head: Linear,
    ) -> None:
        self.spec = spec
        self.dtype = table.dtype
        self.device = table.device
        self._table = table
        self._embedding_scale = embedding_scale(spec, table.dtype)
        self._ropes = ropes
        self._layers = layers
        self._final_norm = final_norm
        self._lm_head = lm_head

    def hidden(self, token_ids: Tensor, plan: AttentionPlan, kv: KvCache, adapters: AdapterDelta | None) -> Tensor:
        """Run the step's tokens through all layers.

        Args:
            token_ids: [T] int64, sequence after sequence as in `plan`; below -1: an adapter's virtual tokens.
            kv: gets this step's keys and values at `plan.slot_mapping`.
            adapters: None when no row of the step has one.
        Returns:
            [T, D] after the final norm, in the model's dtype.
        """
        with torch.inference_mode():
            model = None if adapters is None else adapters.model
            x = self._embed(token_ids, model)
            rotations = tuple(rope.rotation(plan.positions) for rope in self._ropes)
            step = StepInputs(plan, kv, adapters, model, rotations)
            for layer in self._layers:
                x = layer(x, step)
            return self._final_norm(x, model)

    def logits(self, hidden: Tensor, adapters: AdapterDelta | None = None, rows: Sequence[int] | None = None) -> Tensor:
        """Project hidden states [S, D] onto the vocabulary: [S, V], divisor and soft-cap applied.

        `adapters` are those of the step that `hidden` comes from, `rows` its rows there, increasing; None: all of them.
        In the model's dtype, or fp32 where the family computes on the logits: the sampler reads in fp32 only the rows
        that need it, for 32 rows of 152 k tokens a cast of all of them is 6 % of a decode step (2 cores, 2026-11).
        """
        with torch.inference_mode():
            model = None if adapters is None else adapters.model
            product = self._lm_head(hidden) if model is None else model.head(hidden, rows, self._lm_head)
            return finish_logits(product, self.spec)

    def _embed(self, token_ids: Tensor, model: ModelDelta | None) -> Tensor:
        x = self._table(token_ids) if model is None else model.look_up(token_ids, self._table)
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        if model is not None:
            model.place_prompts(x, self.spec.prompt_scale)
        return x


def embedding_scale(spec: ModelSpec, dtype: torch.dtype) -> float:
    """Round the factor on the embedding to the model's dtype, as Gemma does; Granite's are exact in each."""
    return float(torch.tensor(spec.embedding_scale, dtype=dtype).item())


def finish_logits(logits: Tensor, spec: ModelSpec) -> Tensor:
    """Apply the family's divisor and soft-cap to the head's product, in fp32 where there is one."""
    if spec.logit_divisor != 1.0:
        logits = logits.float() / spec.logit_divisor
    cap = spec.logit_soft_cap
    return logits if cap is None else logits.float().div(cap).tanh_().mul_(cap)

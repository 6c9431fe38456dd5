"""The reference forward: base and source run side by side over the same prompts, layer by layer, in float32.

Owns the order of a decoder's parts for every family that `ModelSpec` describes, written a third time, without torch
and without our kernels. Invariants: lanes never see each other; where a source does not act (before an activation's
tokens) a lane's rows are the base's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.float_bits import Float32
from serve.model.families import NormKind, NormPlacement, QkNorm
from serve.model.spec import ModelSpec
from serve.probe.arithmetic import activate, attend, causal_mask, log_softmax, rms_norm, rotate
from serve.probe.change import Watch
from serve.probe.weights import ProbeWeights

Float64 = npt.NDArray[np.float64]
# what a result becomes before the next part reads it
Rounding = Callable[[Floats], Float32]
Rows = list[Float32]


@dataclass(frozen=True, slots=True)
class Lane:
    """One prompt on one source; `rounding` is float32's own, or the serving dtype's to learn what rounding does."""

    source: SourceModel
    token_ids: tuple[int, ...]
    rounding: Rounding


@dataclass(frozen=True, slots=True)
class _Norms:
    """Names of the norms before and after a block; None where the family has none."""

    before: str | None
    after: str | None


_ATTENTION_NORMS = {
    NormPlacement.PRE: _Norms("input_layernorm", None),
    NormPlacement.POST: _Norms(None, "post_attention_layernorm"),
    NormPlacement.BOTH: _Norms("input_layernorm", "post_attention_layernorm"),
}
_MLP_NORMS = {
    NormPlacement.PRE: _Norms("post_attention_layernorm", None),
    NormPlacement.POST: _Norms(None, "post_feedforward_layernorm"),
    NormPlacement.BOTH: _Norms("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_BASE = SourceModel()


class ReferenceDecoder:
    """One pass over a checkpoint for a few lanes."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ProbeWeights,
        lanes: Sequence[Lane],
        *,
        max_model_len: int,
        watch: Watch | None = None,
    ) -> None:
        self._watch = watch
        self._spec = spec
        self._weights = weights
        self._lanes = lanes
        self._max_model_len = max_model_len
        self._prompts = [_prompt_rows(lane.source, spec.dims.hidden_size) for lane in lanes]
        self._first_active = [self._active_row(index) for index in range(len(lanes))]

    def logprobs(self) -> list[Float64]:
        """Return each lane's log-probabilities [T, V] of the token after each of its prompt's."""
        with np.errstate(all="ignore"):
            rows = [self._embed(index) for index in range(len(self._lanes))]
            for layer in range(self._spec.dims.num_hidden_layers):
                rows = self._block(layer, rows, _ATTENTION_NORMS, self._attention)
                rows = self._block(layer, rows, _MLP_NORMS, self._mlp)
            hidden = self._norm(-1, "norm", rows)
            own = [row[len(prompt) :] for row, prompt in zip(hidden, self._prompts, strict=True)]
            return [log_softmax(logits) for logits in self._logits(own)]

    def _active_row(self, index: int) -> int:
        lane = self._lanes[index]
        first = lane.source.active_from(lane.token_ids)
        return 0 if first is None else first + len(self._prompts[index])

    def _embed(self, index: int) -> Float32:
        lane, spec = self._lanes[index], self._spec
        base = self._weights.embeddings(lane.token_ids)
        ids = np.array(lane.token_ids, dtype=np.int64)
        first = max(0, self._first_active[index] - len(self._prompts[index]))
        own = np.concatenate([base[:first], lane.source.embed(ids, base)[first:]])
        return lane.rounding(np.concatenate([self._prompts[index], own * spec.embedding_scale]))

    def _block(
        self, layer: int, rows: Rows, norms: dict[NormPlacement, _Norms], block: Callable[[int, Rows], Rows]
    ) -> Rows:
        """Add a block's output to the residual stream, between its norms."""
        own = norms[self._spec.norm_placement]
        inner = rows if own.before is None else self._norm(layer, own.before, rows)
        inner = block(layer, inner)
        inner = inner if own.after is None else self._norm(layer, own.after, inner)
        scale = self._spec.residual_scale
        return [lane.rounding(x + scale * h) for lane, x, h in zip(self._lanes, rows, inner, strict=True)]

    def _norm(self, layer: int, name: str, rows: Rows) -> Rows:
        weight = self._weights.norm(layer, name)
        return [self._norm_lane(index, layer, name, weight, x) for index, x in enumerate(rows)]

    def _norm_lane(self, index: int, layer: int, name: str, weight: Float32, x: Float32) -> Float32:
        def normed(source: SourceModel) -> Float32:
            own = source.norm(layer, name, weight).astype(np.float32)
            return rms_norm(x, own + 1 if self._spec.norm_kind is NormKind.UNIT_OFFSET else own, self._spec.norm_eps)

        return self._placed(index, normed)

    def _linear(self, layer: int, site: str, rows: Rows) -> Rows:
        weight, bias = self._weights.site(layer, site)
        if self._watch is not None:
            self._watch(layer, site, weight)
        return [self._linear_lane(index, layer, site, x, weight, bias) for index, x in enumerate(rows)]

    def _linear_lane(
        self, index: int, layer: int, site: str, x: Float32, weight: Float32, bias: Float32 | None
    ) -> Float32:
        return self._placed(index, lambda source: source.linear(layer, site, x, weight, bias))

    def _placed(self, index: int, compute: Callable[[SourceModel], Floats]) -> Float32:
        """Return the source's rows where it acts and the base's before."""
        lane, first = self._lanes[index], self._first_active[index]
        own = compute(lane.source)
        return lane.rounding(own if first == 0 else np.concatenate([compute(_BASE)[:first], own[first:]]))

    def _attention(self, layer: int, rows: Rows) -> Rows:
        q, k, v = (self._heads(layer, site, rows) for site in ("q_proj", "k_proj", "v_proj"))
        attended = [self._attend(index, layer, q[index], k[index], v[index]) for index in range(len(rows))]
        return self._linear(layer, "o_proj", attended)

    def _heads(self, layer: int, site: str, rows: Rows) -> Rows:
        """Return projected rows as heads [T, N, E], normed where the family norms them."""
        head_dim = self._spec.dims.head_dim
        projected = self._linear(layer, site, rows)
        name = {"q_proj": "q_norm", "k_proj": "k_norm"}.get(site)
        if name is not None and self._spec.qk_norm is QkNorm.FULL:
            projected = self._norm(layer, name, projected)
        heads = [x.reshape(len(x), -1, head_dim) for x in projected]
        return self._norm(layer, name, heads) if name and self._spec.qk_norm is QkNorm.HEAD else heads

    def _attend(self, index: int, layer: int, q: Float32, k: Float32, v: Float32) -> Float32:
        spec, own, lane = self._spec, self._spec.layers[layer], self._lanes[index]
        prefix = lane.source.kv_prefix(layer)
        num_before = 0 if prefix is None else len(prefix[0])
        if own.rope_index is not None:
            turn = partial(rotate, first=num_before, rope=spec.ropes[own.rope_index], max_model_len=self._max_model_len)
            q, k = lane.rounding(turn(q)), lane.rounding(turn(k))
        if prefix is not None:
            k, v = (np.concatenate([lane.rounding(before), now]) for before, now in zip(prefix, (k, v), strict=True))
        mask = causal_mask(len(q), num_before, own.window)
        return lane.rounding(attend(q, k, v, mask, scale=spec.attention_scale, soft_cap=spec.attention_soft_cap))

    def _mlp(self, layer: int, rows: Rows) -> Rows:
        gate, up = self._linear(layer, "gate_proj", rows), self._linear(layer, "up_proj", rows)
        inner = [lane.rounding(self._activation(g) * u) for lane, g, u in zip(self._lanes, gate, up, strict=True)]
        found = self._linear(layer, "down_proj", inner)
        return [self._own_mlp(index, layer, x, found[index]) for index, x in enumerate(rows)]

    def _own_mlp(self, index: int, layer: int, x: Float32, ordinary: Float32) -> Float32:
        """Return the source's own MLP where it has one."""

        def linear(site: str, x: Floats) -> Floats:
            return lane.source.linear(layer, site, x, *self._weights.site(layer, site))

        lane, first = self._lanes[index], self._first_active[index]
        own = lane.source.mlp(layer, x, linear, self._activation)
        return ordinary if own is None else lane.rounding(np.concatenate([ordinary[:first], own[first:]]))

    def _activation(self, x: Floats) -> Float32:
        return activate(self._spec.activation, x.astype(np.float32))

    def _logits(self, rows: Rows) -> list[Float64]:
        """Return each lane's logits [T, V], divisor and cap applied."""
        pieces: list[list[Floats]] = [[] for _ in rows]
        for piece in self._weights.head():
            for index, (lane, x) in enumerate(zip(self._lanes, rows, strict=True)):
                first = max(0, self._first_active[index] - len(self._prompts[index]))
                own = lane.source.head(x, piece.weight, piece.bias, piece.first)
                base = _BASE.head(x[:first], piece.weight, piece.bias, piece.first)
                pieces[index].append(lane.rounding(np.concatenate([base, own[first:]])))
        cap = self._spec.logit_soft_cap
        logits = [np.concatenate(own, axis=1).astype(np.float64) / self._spec.logit_divisor for own in pieces]
        return logits if cap is None else [cap * np.tanh(own / cap) for own in logits]


def _prompt_rows(source: SourceModel, hidden_size: int) -> Float32:
    rows = source.prompt()
    return np.zeros((0, hidden_size), np.float32) if rows is None else rows.astype(np.float32)

"""Compositions outside the linear layers: embedding, norms, gated MLPs and output head as weighted sums of changes.

Formula and invariants: `composed.py`. An MLP whose experts share one gate counts as one site, input to output, since
its experts are mixed behind the activation. Prompts and prefixes belong to rows of one adapter and pass through.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adapter_kernels.composed import KnownBase, Pass, weighted_sum
from adapter_kernels.delta import BaseLinear, BaseNorm, BaseProduct, BaseTable, ModelDelta


class ComposedModelDelta:
    """One step's `ModelDelta` where rows from `begin` on are composed and `plain` serves the others."""

    def __init__(self, plain: ModelDelta | None, begin: int, passes: Sequence[Pass]) -> None:
        self._plain = plain
        self._begin = begin
        self._passes = tuple(part for part in passes if part.model is not None)

    def look_up(self, token_ids: Tensor, table: BaseTable) -> Tensor:
        """Embed tokens; see `ModelDelta.look_up`."""
        plain = self._plain
        x = table(token_ids) if plain is None else plain.look_up(token_ids, table)
        own_ids, own_x = token_ids[self._begin :], x[self._begin :]
        own_x.copy_(weighted_sum(self._passes, own_x, lambda part: _model(part).look_up(own_ids, table)))
        return x

    def place_prompts(self, x: Tensor, scale: float) -> None:
        """Write the prompts of rows with one adapter."""
        if self._plain is not None:
            self._plain.place_prompts(x, scale)

    def norm(self, layer: int, name: str, x: Tensor, y: Tensor, base: BaseNorm) -> None:
        """Run norms; see `ModelDelta.norm`."""
        if self._plain is not None:
            self._plain.norm(layer, name, x, y, base)
        acting = [part for part in self._passes if (layer, name) in part.norms]
        if acting:
            own_x, own_y = x[self._begin :], y[self._begin :]

            def act(part: Pass) -> Tensor:
                normed = own_y.clone()
                _model(part).norm(layer, name, own_x, normed, base)
                return normed

            own_y.copy_(weighted_sum(acting, own_y, act))

    def write_prefix(self, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write the prefixes of rows with one adapter."""
        if self._plain is not None:
            self._plain.write_prefix(layer, k_cache, v_cache)

    def mlp(
        self, layer: int, x: Tensor, gate_up: Tensor, activation: Callable[[Tensor], Tensor], down: BaseProduct
    ) -> Tensor | None:
        """Run an MLP with shared gates; see `ModelDelta.mlp`."""
        acting = [part for part in self._passes if layer in part.gated]
        if not acting:
            return None if self._plain is None else self._plain.mlp(layer, x, gate_up, activation, down)
        own_x, own_gate_up = x[self._begin :], gate_up[self._begin :].clone()
        y = None if self._plain is None else self._plain.mlp(layer, x, gate_up, activation, down)
        if y is None:
            gate, up = gate_up.chunk(2, dim=-1)
            y = down(activation(gate).mul_(up))

        def own_down(activated: Tensor) -> Tensor:
            # the site behind takes all rows of the step; those before ours are not looked at
            whole = activated.new_zeros(x.shape[0], activated.shape[1])
            whole[self._begin :] = activated
            return down(whole)[self._begin :]

        def act(part: Pass) -> Tensor:
            mixed = _model(part).mlp(layer, own_x, own_gate_up.clone(), activation, own_down)
            assert mixed is not None, "a layer with a gate runs its MLP"
            return mixed

        own_y = y[self._begin :]
        own_y.copy_(weighted_sum(acting, own_y, act))
        return y

    def head(self, hidden: Tensor, rows: Sequence[int] | None, base: BaseLinear) -> Tensor:
        """Run the output head; see `ModelDelta.head`."""
        logits = base(hidden) if self._plain is None else self._plain.head(hidden, rows, base)
        first = self._begin if rows is None else bisect_left(rows, self._begin)
        own_hidden, own_logits = hidden[first:], logits[first:]
        if own_hidden.shape[0]:
            places = range(own_hidden.shape[0]) if rows is None else [row - self._begin for row in rows[first:]]
            known = KnownBase(base, own_hidden, own_logits.clone())
            own_logits.copy_(
                weighted_sum(
                    self._passes,
                    own_logits,
                    lambda part: _model(part).head(own_hidden, places, known),
                    torch.tensor(places),
                )
            )
        return logits


def _model(part: Pass) -> ModelDelta:
    assert part.model is not None, "only passes that act outside the linear layers are kept"
    return part.model

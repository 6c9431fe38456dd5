"""Rows on which several adapters act at once, on the CPU: y = y_base + sum_i w_i (y_i - y_base), at every site.

A composition is a static route of more than one adapter per row and never a merged weight. Composed rows are the last
ones of a step; their adapters are dealt onto passes, each an ordinary `CpuDelta` with at most one adapter per row.
Adapters that only add run on a zero base, so that nothing of a small change is rounded away beside y; those that
change the base's own product (scales, frames) run on the base's, computed once. Sums are fp32. Invariants: what a row
gets depends on its own adapters in their order, never on the rows beside it; rows are selected, never masked by zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter_kernels.cpu import CpuDelta
from adapter_kernels.delta import FUSED_SITES, AdapterDelta, BaseLinear, ModelDelta
from adapter_kernels.model_delta import CpuModelDelta
from adapter_kernels.route import Placement, build_route

# one sequence's adapters with their weights, in the order in which they are summed
Composition = tuple[tuple[Placement, float], ...]

_FUSED_OF = {site: fused for fused, members in FUSED_SITES.items() for site in members}


class NotComposable(Exception):
    """An adapter whose effect is no change of a site's output: its prompt or prefix are positions of their own."""


@dataclass(frozen=True, slots=True)
class Pass:
    """At most one adapter per composed row. `weights` [C] fp32, `acts` [C] bool: false where a row has none here."""

    delta: CpuDelta
    model: CpuModelDelta | None
    weights: Tensor
    acts: Tensor
    only_adds: bool
    # (layer, fused site) where it does anything, (layer, norm) likewise, layers with a gated MLP
    sites: frozenset[tuple[int, str]]
    norms: frozenset[tuple[int, str]]
    gated: frozenset[int]

    def add(self, total: Tensor, change: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return total [n, ..] fp32 plus the weighted change of the rows that have an adapter here.

        Args:
            rows: which composed rows these are; None: all.
        """
        weights, acts = (self.weights, self.acts) if rows is None else (self.weights[rows], self.acts[rows])
        shape = (-1, *(1,) * (total.dim() - 1))
        return torch.where(acts.view(shape), total + weights.view(shape) * change.float(), total)


class ComposedDelta:
    """One step's `AdapterDelta` where rows from `begin` on are composed and `plain` serves the others."""

    def __init__(
        self, plain: AdapterDelta | None, begin: int, passes: tuple[Pass, ...], model: ModelDelta | None
    ) -> None:
        self.model = model
        self._plain = plain
        self._begin = begin
        self._passes = passes

    def apply(self, layer: int, site: str, x: Tensor, base: BaseLinear) -> Tensor:
        """Run a fused site with every row's adapters; see `adapter_kernels.delta.AdapterDelta`."""
        y = base(x) if self._plain is None else self._plain.apply(layer, site, x, base)
        acting = [part for part in self._passes if (layer, site) in part.sites]
        if acting:
            own_x, own_y = x[self._begin :], y[self._begin :]
            known = own_y.clone()
            total = known.float()
            for part in acting:
                if part.only_adds:
                    change = part.delta.apply(layer, site, own_x, ZeroBase(known))
                else:
                    change = part.delta.apply(layer, site, own_x, KnownBase(base, own_x, known)).float() - known.float()
                total = part.add(total, change)
            own_y.copy_(total)
        return y


class ZeroBase:
    """A base whose product is zero: what an adapter adds is all that comes out."""

    def __init__(self, like: Tensor) -> None:
        self._like = like

    @property
    def bias(self) -> None:
        """None."""
        return

    def __call__(self, x: Tensor) -> Tensor:
        return torch.zeros_like(self._like)


class KnownBase:
    """The base with one product known: that of `x` itself is copied, any other input is multiplied."""

    def __init__(self, base: BaseLinear, x: Tensor, y: Tensor) -> None:
        self._base = base
        self._x = x
        self._y = y

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self._base.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._y.clone() if x is self._x else self._base(x)


def build_passes(compositions: Sequence[Composition], counts: Sequence[int], token_ids: Tensor) -> tuple[Pass, ...]:
    """Deal the adapters of composed sequences onto passes: first those that only add, then the others.

    Args:
        counts: rows of each sequence. token_ids: [C] of these rows.
    Raises:
        NotComposable: one of the adapters has a prompt or a prefix.
    """
    passes: list[Pass] = []
    for only_adds in (True, False):
        dealt = [[pair for pair in own if _only_adds(pair[0]) is only_adds] for own in compositions]
        for depth in range(max(map(len, dealt), default=0)):
            chosen = [own[depth] if depth < len(own) else None for own in dealt]
            passes.append(_pass(chosen, counts, token_ids, only_adds=only_adds))
    return tuple(passes)


def weighted_sum(
    passes: Sequence[Pass], y: Tensor, act: Callable[[Pass], Tensor], rows: Tensor | None = None
) -> Tensor:
    """Return y + sum_i w_i (act(i) - y) in y's dtype; y [n, ..] is the base's, of all composed rows or of `rows`."""
    base = total = y.float()
    for part in passes:
        total = part.add(total, act(part).float() - base, rows)
    return total.to(y.dtype)


def _pass(
    chosen: Sequence[tuple[Placement, float] | None], counts: Sequence[int], token_ids: Tensor, *, only_adds: bool
) -> Pass:
    placements = [None if pair is None else pair[0] for pair in chosen]
    for placement in placements:
        _check(placement)
    route = build_route(placements, list(counts))
    # no row of these is a virtual token, so no cache slot is asked for
    model = CpuModelDelta.build(route, token_ids, torch.empty(0, dtype=torch.int64))
    repeats = torch.tensor(counts)
    weights = torch.tensor([0.0 if pair is None else pair[1] for pair in chosen], dtype=torch.float32)
    acts = torch.tensor([pair is not None for pair in chosen])
    places = {(p.slab_id, p.position): p for p in placements if p is not None}.values()
    models = [p.extras.model for p in places if p.extras is not None and p.extras.model is not None]
    return Pass(
        delta=CpuDelta(route, model),
        model=model,
        weights=weights.repeat_interleave(repeats),
        acts=acts.repeat_interleave(repeats),
        only_adds=only_adds,
        sites=frozenset(key for place in places for key in _fused_sites(place)),
        norms=frozenset(key for own in models for key in own.norms),
        gated=frozenset(layer for own in models for layer in own.gates),
    )


def _fused_sites(placement: Placement) -> set[tuple[int, str]]:
    rare = () if placement.extras is None else placement.extras.sites
    return {*placement.slab.fused, *((layer, _FUSED_OF[site]) for layer, site in rare)}


def _only_adds(placement: Placement) -> bool:
    rare = () if placement.extras is None else placement.extras.sites.values()
    return not placement.slab.has_scales and all(site.frame is None for site in rare)


def _check(placement: Placement | None) -> None:
    extras = None if placement is None else placement.extras
    num_virtual = 0 if extras is None or extras.model is None else extras.model.num_virtual_tokens
    if num_virtual:
        raise NotComposable(f"an adapter with a prompt of {num_virtual} virtual tokens cannot be composed")

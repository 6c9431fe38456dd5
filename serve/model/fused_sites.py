"""A fused site on the GPU: the base GEMM on the main stream, the adapters' small kernels beside it.

Owns the fork before the GEMM, the join after it, and which workspace is used; the op that reads the result is the
caller's. Invariant: at a site where no adapter of the step acts nothing but the GEMM is launched, and where adapters
act, nothing of theirs stands between the GEMM and the op that reads it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.expand import expand
from adapter_kernels.gpu.scale_input import scale_input
from adapter_kernels.gpu.shrink import num_planes, num_splits, shrink
from adapter_kernels.gpu.sink_inputs import DeltaInput
from adapter_kernels.gpu.step import SiteAdapters, SiteInput, StepAdapters
from adapter_kernels.gpu.tables import IN_SCALE, first_site
from serve.model.composed_site import ComposedSite
from serve.model.fused_step import FusedStep
from serve.model.weight_source import SiteWeights

# of `Workspace.bridges`: one for bridges that a sink reads on the main stream, one for those read on the side stream
_SINK_BRIDGE = 0
_DELTA_BRIDGE = 1


@dataclass(frozen=True, slots=True)
class Bridged:
    """y [T, O] of the base alone, and the bridge to the deltas on top of it; None: no adapter acts here."""

    y: Tensor
    adapters: SiteAdapters | None


@dataclass(frozen=True, slots=True)
class WithDelta:
    """y [T, O] of the base alone, and the deltas on top of it; None: no adapter acts here."""

    y: Tensor
    delta: DeltaInput | None


class FusedSite:
    """One fused site of one layer."""

    def __init__(self, weights: SiteWeights, layer: int, site: str, widths: tuple[int, ...]) -> None:
        """Take the base weights.

        Args:
            site: key of `FUSED_SITES`. widths: output columns of each member.
        """
        self._key = (layer, site)
        self._weights = weights
        self._widths = widths
        self._first_site = first_site(layer, site)
        self._members = FUSED_SITES[site]
        self._num_members = len(self._members)
        self._num_splits = num_splits(weights.weight.shape[1])
        # behind the join nothing reads this bridge, and a sink may still read the other
        self._composed = ComposedSite(weights, layer, site, widths, _DELTA_BRIDGE)

    def project(self, x: Tensor, step: FusedStep) -> Bridged:
        """Run base GEMM and, beside it, the shrink; the caller's sink expands."""
        adapters = self._acting(step)
        if adapters is None:
            y = self._gemm(x)
            self._composed.add(x, y, step)
            return Bridged(y, None)
        with step.side.fork():
            bridged = self._shrink(x, adapters, step, _SINK_BRIDGE)
        y = self._scaled_gemm(x, adapters)
        step.side.join()
        self._composed.add(x, y, step)
        return Bridged(y, bridged)

    def project_with_delta(self, x: Tensor, step: FusedStep) -> WithDelta:
        """Run the base GEMM and, beside it, shrink and expand into the delta buffer; for sites of one member."""
        adapters = self._acting(step)
        if adapters is None:
            y = self._gemm(x)
            self._composed.add(x, y, step)
            return WithDelta(y, None)
        delta = adapters.workspace.delta(x.shape[0], self._widths[0])
        with step.side.fork():
            bridged = self._shrink(x, adapters, step, _DELTA_BRIDGE)
            self.expand(bridged, delta, step, accumulate=False)
        y = self._scaled_gemm(x, adapters)
        step.side.join()
        self._composed.add(x, y, step)
        slots, families = adapters.route.slots, bridged.families
        return WithDelta(y, DeltaInput(delta, adapters.tables, slots, self._first_site, families))

    def expand(self, bridged: SiteAdapters, out: Tensor, step: FusedStep, *, accumulate: bool) -> None:
        """Launch the expand of all members, into a delta buffer or, accumulating, on top of the base's y."""
        expand(
            bridged.bridge,
            bridged.tables,
            self._first_site,
            self._widths,
            bridged.route,
            out,
            accumulate=accumulate,
            families=bridged.families,
            config=step.config("expand", out.shape[1]),
        )

    def _acting(self, step: FusedStep) -> StepAdapters | None:
        adapters = step.inputs.adapters
        return adapters if adapters is not None and self._key in adapters.sites.fused else None

    def _gemm(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weights.weight, self._weights.bias)

    def _scaled_gemm(self, x: Tensor, adapters: StepAdapters) -> Tensor:
        """Run the base GEMM; its input is scaled for the rows whose adapter does so."""
        scaled = [i for i, site in enumerate(self._members) if (self._key[0], site) in adapters.sites.in_scaled]
        if not scaled:
            return self._gemm(x)
        if self._num_members == 1:
            return self._gemm(self._scale(x, adapters, 0))
        # members share one product: one that is scaled alone costs another, of its own columns
        y = self._gemm(x)
        for member in scaled:
            self._replace_columns(y, self._scale(x, adapters, member), adapters, member)
        return y

    def _scale(self, x: Tensor, adapters: StepAdapters, member: int) -> Tensor:
        scaled = torch.empty_like(x)
        scale_input(x, adapters.tables, self._first_site + member, adapters.route.slots, scaled)
        return scaled

    def _replace_columns(self, y: Tensor, x: Tensor, adapters: StepAdapters, member: int) -> None:
        """Put the products of scaled rows in the place of a member's columns; other rows keep theirs, bit by bit."""
        begin = sum(self._widths[:member])
        own = slice(begin, begin + self._widths[member])
        bias = self._weights.bias
        product = functional.linear(x, self._weights.weight[own], None if bias is None else bias[own])
        slots = adapters.route.slots
        entries = adapters.tables.rows[self._first_site + member, :, IN_SCALE]
        is_scaled = (slots >= 0) & (entries.index_select(0, slots.clamp(min=0)) >= 0)
        y[:, own] = torch.where(is_scaled[:, None], product, y[:, own])

    def _shrink(self, x: Tensor, adapters: StepAdapters, step: FusedStep, bridge_index: int) -> SiteAdapters:
        planes = num_planes(self._num_splits, adapters.route.block_rows)
        bridge = adapters.workspace.bridge(bridge_index, planes, x.shape[0], self._num_members)
        shrink(
            x,
            adapters.tables,
            self._first_site,
            self._num_members,
            adapters.route,
            bridge,
            has_families=adapters.sites.has_families,
            config=step.config("shrink", x.shape[1]),
        )
        families = SiteInput(x, self._weights.bias) if adapters.sites.has_families else None
        return SiteAdapters(adapters.tables, adapters.route, bridge, self._first_site, planes, families)

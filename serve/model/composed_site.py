"""What compositions do at a fused site on the GPU: their shrink, the products of scaled inputs, and `compose`.

Owns the order of these launches, part by part, on the main stream behind the base GEMM. Invariant: they change the
composed rows of y and nothing else, so the op that reads y meets those rows as rows without adapter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.delta import FUSED_SITES
from adapter_kernels.gpu.compose import compose
from adapter_kernels.gpu.scale_input import scale_input
from adapter_kernels.gpu.shrink import num_planes, num_splits, shrink
from adapter_kernels.gpu.step import ComposedPart, SiteAdapters, SiteInput, StepComposition
from adapter_kernels.gpu.tables import first_site
from serve.model.fused_step import FusedStep
from serve.model.weight_source import SiteWeights


@dataclass(frozen=True, slots=True)
class ComposedSite:
    """One fused site of one layer, where compositions act; `widths` are the members' output columns."""

    weights: SiteWeights
    layer: int
    site: str
    widths: tuple[int, ...]
    # of `Workspace.bridges`: one that nothing reads at this point, on either stream
    bridge_index: int

    def add(self, x: Tensor, y: Tensor, step: FusedStep) -> None:
        """Add to the composed rows of y [T, O], the base's output, what their adapters make of x [T, D]."""
        composition = step.inputs.composition
        if composition is None or (self.layer, self.site) not in composition.sites.fused:
            return
        for part in composition.parts:
            own = composition.workspace.pair_input(part.row_of.shape[0], x.shape[1])
            torch.index_select(x, 0, part.row_of, out=own)
            pairs = self._shrink(own, part, composition, step)
            products = self._products(own, part, composition)
            config = step.configs.pick("compose", y.shape[1], part.route.block_rows)
            compose(pairs, part, self.widths, products, y, config=config)

    def _shrink(self, x: Tensor, part: ComposedPart, composition: StepComposition, step: FusedStep) -> SiteAdapters:
        tables, route, first = composition.tables, part.route, first_site(self.layer, self.site)
        num_members = len(self.widths)
        planes = num_planes(num_splits(x.shape[1]), route.block_rows)
        bridge = composition.workspace.bridge(self.bridge_index, planes, x.shape[0], num_members)
        shrink(
            x,
            tables,
            first,
            num_members,
            route,
            bridge,
            has_families=composition.sites.has_families,
            config=step.configs.pick("shrink", x.shape[1], route.block_rows),
        )
        return SiteAdapters(tables, route, bridge, first, planes, SiteInput(x, self.weights.bias))

    def _products(self, x: Tensor, part: ComposedPart, composition: StepComposition) -> Tensor | None:
        """Multiply the base with the pairs' scaled inputs, member by member; None: no adapter here scales any."""
        members = FUSED_SITES[self.site]
        scaled = [i for i, site in enumerate(members) if (self.layer, site) in composition.sites.in_scaled]
        if not scaled:
            return None
        weight, bias = self.weights.weight, self.weights.bias
        # columns of other members are never read
        products = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        for member in scaled:
            begin = sum(self.widths[:member])
            own = slice(begin, begin + self.widths[member])
            turned = torch.empty_like(x)
            scale_input(x, composition.tables, first_site(self.layer, self.site) + member, part.route.slots, turned)
            products[:, own] = functional.linear(turned, weight[own], None if bias is None else bias[own])
        return products

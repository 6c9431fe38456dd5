"""The adapters of a step outside the linear layers, on the CPU: embedding, norms, prompts, prefixes, output head.

Formulas: `reference_model`. One pass per adapter that has such ops, over its own rows, never per request. Invariant:
only rows of those adapters are written, each with its own adapter's tensors; all other rows keep the base's bits.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels.delta import BaseLinear, BaseNorm, BaseProduct, BaseTable
from adapter_kernels.mlp_mixture import MlpRun, run_mlp
from adapter_kernels.model_image import ModelTensors, TokenRows
from adapter_kernels.route import Route, Run


@dataclass(frozen=True, slots=True)
class _Virtual:
    """Virtual tokens among a run's rows: step rows [n], which token of the prompt each is, and its cache slot."""

    rows: Tensor
    index: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class _ModelRun:
    """Rows `begin .. end` of the step and what their adapter brings."""

    begin: int
    end: int
    model: ModelTensors
    mlp: dict[int, MlpRun]
    virtual: _Virtual | None

    def own(self, rows: Tensor) -> Tensor:
        return rows[self.begin : self.end]


class CpuModelDelta:
    """`adapter_kernels.delta.ModelDelta` of one step on the CPU."""

    def __init__(self, runs: list[_ModelRun]) -> None:
        self._runs = runs

    @classmethod
    def build(cls, route: Route, token_ids: Tensor, slot_mapping: Tensor) -> "CpuModelDelta | None":
        """Find the adapters of a step that act outside the linear layers; None where there are none.

        Args:
            token_ids: [T] int64; -2 - i is token i of the adapter's prompt. slot_mapping: [T] cache slots.
        """
        runs = [_model_run(run, token_ids, slot_mapping) for run in route.runs if has_model_ops(run)]
        found = [run for run in runs if run is not None]
        if not found:
            return None
        num_placed = sum(run.virtual.rows.shape[0] for run in found if run.virtual is not None)
        num_virtual = int((token_ids < -1).sum())
        assert num_virtual == num_placed, f"{num_virtual - num_placed} virtual tokens belong to no adapter of the step"
        return cls(found)

    def look_up(self, token_ids: Tensor, table: BaseTable) -> Tensor:
        """Embed tokens; see `ModelDelta.look_up`."""
        x = table(token_ids.clamp(min=0))
        for run in self._runs:
            own_ids, own_x, model = run.own(token_ids), run.own(x), run.model
            if model.embed_rows is not None:
                _replace_rows(own_ids, model.embed_rows, own_x)
            if model.embed_lowrank is not None:
                # a virtual token's row is overwritten later
                own_x.addmm_(model.embed_lowrank.at[own_ids.clamp(min=0)], model.embed_lowrank.bt)
            if run.virtual is not None:
                x.index_fill_(0, run.virtual.rows, 0.0)
        return x

    def place_prompts(self, x: Tensor, scale: float) -> None:
        """Write the prompts' embeddings; see `ModelDelta.place_prompts`."""
        for run in self._runs:
            if run.virtual is not None and run.model.prompt_embeds is not None:
                prompt = run.model.prompt_embeds[run.virtual.index]
                x.index_copy_(0, run.virtual.rows, prompt if scale == 1.0 else prompt * scale)

    def norm(self, layer: int, name: str, x: Tensor, y: Tensor, base: BaseNorm) -> None:
        """Run norms with the adapters' weights; see `ModelDelta.norm`."""
        for run in self._runs:
            weight = run.model.norms.get((layer, name))
            if weight is not None:
                run.own(y).copy_(base.replaced(run.own(x), weight))

    def write_prefix(self, layer: int, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write the prefixes' keys and values; see `ModelDelta.write_prefix`."""
        for run in self._runs:
            prefix = run.model.kv_prefix
            if run.virtual is not None and prefix is not None:
                for cache, own in ((k_cache, prefix.k[layer]), (v_cache, prefix.v[layer])):
                    cache.view(-1, *cache.shape[2:]).index_copy_(0, run.virtual.slots, own[run.virtual.index])

    def mlp(
        self, layer: int, x: Tensor, gate_up: Tensor, activation: Callable[[Tensor], Tensor], down: BaseProduct
    ) -> Tensor | None:
        """Run an MLP with shared gates; see `ModelDelta.mlp`."""
        acting = [(run.begin, run.end, run.mlp[layer]) for run in self._runs if layer in run.mlp]
        return run_mlp(acting, x, gate_up, activation, down) if acting else None

    def head(self, hidden: Tensor, rows: Sequence[int] | None, base: BaseLinear) -> Tensor:
        """Run the output head; see `ModelDelta.head`."""
        logits = base(hidden)
        for run in self._runs:
            if not run.model.acts_on_head:
                continue
            begin, end = (
                (run.begin, run.end) if rows is None else (bisect_left(rows, run.begin), bisect_left(rows, run.end))
            )
            if begin < end:
                _add_head(hidden[begin:end], logits[begin:end], run.model)
        return logits


def has_model_ops(run: Run) -> bool:
    """Does the run's adapter act outside the linear layers, or mix experts behind one gate of an MLP?"""
    return run.placement.extras is not None and run.placement.extras.model is not None


def _model_run(run: Run, token_ids: Tensor, slot_mapping: Tensor) -> _ModelRun | None:
    extras = run.placement.extras
    if extras is None or extras.model is None:
        return None
    model, end = extras.model, run.begin + run.count
    virtual = None
    if model.num_virtual_tokens:
        rows = run.begin + (token_ids[run.begin : end] < -1).nonzero()[:, 0]
        if rows.numel():
            virtual = _Virtual(rows, -2 - token_ids[rows], slot_mapping[rows])
    mlp = {layer: MlpRun.of(layer, gate, extras.sites) for layer, gate in model.gates.items()}
    return _ModelRun(run.begin, end, model, mlp, virtual)


def _replace_rows(token_ids: Tensor, rows: TokenRows, x: Tensor) -> None:
    """Overwrite x [n, H] where the adapter has a row of its own for the token."""
    place = torch.searchsorted(rows.idx, token_ids).clamp_(max=rows.idx.shape[0] - 1)
    found = (rows.idx[place] == token_ids).nonzero()[:, 0]
    x.index_copy_(0, found, rows.e[place[found]])


def _add_head(hidden: Tensor, logits: Tensor, model: ModelTensors) -> None:
    """Change one adapter's logits [n, V] in place; the replaced rows come first, as part of the table."""
    if model.head_rows is not None:
        logits.index_copy_(1, model.head_rows.idx, functional.linear(hidden, model.head_rows.e))
    if model.head is None:
        return
    if model.head.a.shape[0]:
        logits.addmm_(functional.linear(hidden, model.head.a), model.head.bt)
    if model.head.bias is not None:
        logits.add_(model.head.bias)

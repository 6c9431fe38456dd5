"""A PEFT folder as its own forward: every module's `Delta.apply`, scales and rotations around the base's product.

Owns which part of a module of the trained model a site of the base is. Invariant: only the tuner's own formula is
used, never what was stored of it; the values of one module are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import HEAD, BaseDims
from adapters_store.convert.model_factors import TokenValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.peft import OpenPeft, open_folder
from adapters_store.convert.source_model import Floats, SourceModel
from adapters_store.convert.tuner import Delta, PlannedModule, ScaledDelta, TurningDelta
from adapters_store.ops import HEAD_LAYER


@dataclass(frozen=True, slots=True)
class _Part:
    """One site's share of a module of the file: its outputs `begin..end` of `num_out`."""

    planned: PlannedModule
    begin: int
    end: int
    num_out: int


class PeftSource(SourceModel):
    """The open folder and, by layer and site, which part of which module acts there."""

    def __init__(self, opened: OpenPeft, base: BaseDims) -> None:
        self._opened = opened
        self._model = opened.plan.model
        self._parts = _parts(opened.plan.modules, base)
        self._path: str | None = None
        self._delta: Delta | None = None

    def linear(self, layer: int, site: str, x: Floats, weight: Floats, bias: Floats | None) -> Floats:
        """Return `turned_outputs(out_scale * (W (in_scale * turned_inputs(x)))) + b` plus what PEFT adds."""
        part = self._parts.get((layer, site))
        if part is None:
            return super().linear(layer, site, x, weight, bias)
        delta = self._delta_of(part.planned)
        own = slice(part.begin, part.end)
        out_scale, in_scale = delta.scales() if isinstance(delta, ScaledDelta) else (None, None)
        read = x if in_scale is None else x * in_scale
        if isinstance(delta, TurningDelta):
            read = delta.turned_inputs(read.astype(np.float64))
        y: Floats = read @ weight.T
        y = y if out_scale is None else y * out_scale[own]
        if isinstance(delta, TurningDelta):
            # rotations stay within a site, but their angles lie in the module's order
            whole = np.zeros((len(x), part.num_out))
            whole[:, own] = y
            y = delta.turned_outputs(whole)[:, own]
        y = y if bias is None else y + bias
        return y + delta.apply(x.astype(np.float64))[:, own]

    def embed(self, token_ids: npt.NDArray[np.int64], rows: Floats) -> Floats:
        """Return trained rows in their tokens' places, and what the embedding's LoRA adds."""
        found = rows
        for target in ("embed", "both"):
            if target in self._model.token_rows:
                found = _replaced(token_ids, found, self._model.token_rows[target])
        embedding = self._model.embedding
        return found if embedding is None else found + embedding.apply(token_ids)

    def norm(self, layer: int, name: str, weight: Floats) -> Floats:
        """Return the trained weight."""
        trained = self._model.norms.get((layer, name))
        return weight if trained is None else trained

    def head(self, x: Floats, weight: Floats, bias: Floats | None, first: int) -> Floats:
        """Return logits by trained rows, and what an adapter of the head adds."""
        tokens = np.arange(first, first + len(weight))
        for target in ("lm_head", "both"):
            if target in self._model.token_rows:
                weight = _replaced(tokens, weight, self._model.token_rows[target])
        y = super().head(x, weight, bias, first)
        part = self._parts.get((HEAD_LAYER, HEAD))
        if part is None:
            return y
        return y + self._delta_of(part.planned).apply(x.astype(np.float64))[:, first : first + len(weight)]

    def prompt(self) -> Floats | None:
        """Return PEFT's prompt."""
        return None if self._model.prompt is None else self._model.prompt.apply()

    def kv_prefix(self, layer: int) -> tuple[Floats, Floats] | None:
        """Return PEFT's keys and values."""
        return None if self._model.prefix is None else self._model.prefix.apply(layer)

    def active_from(self, token_ids: tuple[int, ...]) -> int | None:
        """Return where the invocation begins for the last time, searched from behind."""
        wanted = self._opened.config.activation
        if not wanted:
            return None
        for begin in range(len(token_ids) - len(wanted), -1, -1):
            if token_ids[begin : begin + len(wanted)] == wanted:
                return begin
        return len(token_ids)

    def _delta_of(self, planned: PlannedModule) -> Delta:
        if self._path != planned.source.path or self._delta is None:
            self._delta = planned.load(self._opened.file)
            self._path = planned.source.path
        return self._delta


@contextmanager
def open_peft(folder: Path, options: ConvertOptions) -> Iterator[PeftSource]:
    """Open a folder that was converted before; raises AdapterRefused as the conversion does."""
    with open_folder(folder, options) as opened:
        yield PeftSource(opened, options.base)


def _replaced(token_ids: npt.NDArray[np.int64], rows: Floats, trained: TokenValues) -> Floats:
    """Return rows with those of trained tokens in their places, one by one."""
    by_token = dict(zip(trained.ids.tolist(), trained.rows, strict=True))
    return np.stack([by_token.get(token, row) for token, row in zip(token_ids.tolist(), rows, strict=True)])


def _parts(planned: dict[str, PlannedModule], base: BaseDims) -> dict[tuple[int, str], _Part]:
    parts = {}
    for plan in planned.values():
        begin = 0
        for site in plan.source.sites:
            end = begin + base.site_shape(site)[0]
            parts[plan.source.layer, site] = _Part(plan, begin, end, plan.source.dims(base)[0])
            begin = end
    return parts

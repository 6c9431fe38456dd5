"""Any fine-tuned model of the base -> canonical adapter: its difference to the base, matrix by matrix.

Owns which op serves which tensor, the option `lossy`, and the refusal of what only a dense delta would serve, which
names the matrix. Norms and vocabulary rows are stored whole, biases as differences. Invariant: every tensor of the
checkpoint is the base's, served by an op, or named; two matrices at most are in memory at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from adapters_store.base import SITES
from adapters_store.convert.foreign import Foreign, Site, Values, write_foreign
from adapters_store.convert.frozen_tensors import compare_config
from adapters_store.convert.hf_outer import read_outer
from adapters_store.convert.hf_source import HfSource, check_tensors, site_stem, site_values
from adapters_store.convert.model_files import ModelFiles, open_model
from adapters_store.convert.option_values import OptionValues
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.param_deltas import ParamDelta, csr_values
from adapters_store.convert.site_effect import Float64
from adapters_store.convert.source_model import SourceModel
from adapters_store.convert.weight_change import Change, Facts, classify
from adapters_store.errors import UnsupportedAdapter, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.ops import Csr, Module
from adapters_store.safetensors_header import CANONICAL_LIMITS, EXTERNAL_LIMITS
from adapters_store.strict_json import Json

_MAX_KEPT_BYTES = 512 << 20


def convert_hf_model(source: Path, target: Path, options: ConvertOptions) -> None:
    """Convert the checkpoint in `source`; raises AdapterRefused."""
    values = OptionValues("a fine-tuned model", options.declared.options, ("lossy",))
    is_lossy = values.flag("lossy", default=False)
    base_dir = _need_base_dir(options)
    is_tied = options.base.tie_word_embeddings
    with (
        open_model(source, EXTERNAL_LIMITS, is_trusted=False, is_tied=is_tied) as found,
        open_model(base_dir, CANONICAL_LIMITS, is_trusted=True, is_tied=is_tied) as base,
    ):
        compare_config(source, base_dir)
        pair = _Pair(found, base, options, is_lossy=is_lossy)
        check_tensors(found, base, options.base)
        outer = read_outer(found, base, options.base)
        sites = tuple(pair.sites())
        foreign = Foreign(
            family="model",
            source_format="hf_model",
            sites=sites,
            model_ops=outer.ops(),
            model_values=outer.values,
            recorded={**values.recorded, **pair.facts()},
            ignored=tuple(outer.ignored),
            is_base_dependent=True,
        )
        write_foreign(source, target, foreign, options)


@contextmanager
def open_hf_model(source: Path, options: ConvertOptions) -> Iterator[SourceModel]:
    """Open a checkpoint that was converted before as its own forward: itself."""
    with open_model(source, EXTERNAL_LIMITS, is_trusted=False, is_tied=options.base.tie_word_embeddings) as found:
        yield HfSource(found, options.base)


class _Pair:
    """The checkpoint's and the base's linear layers; one change is kept at a time."""

    def __init__(self, found: ModelFiles, base: ModelFiles, options: ConvertOptions, *, is_lossy: bool) -> None:
        self._found = found
        self._base = base
        self._options = options
        self._is_lossy = is_lossy
        self._kept: tuple[tuple[int, str], Change] | None = None
        # finding a low rank costs seconds per matrix, its factors a few hundred kilobytes
        self._low_ranks: dict[tuple[int, str], Change] = {}
        self._low_rank_bytes = 0
        self._errors: list[float] = []
        self._kinds: dict[str, int] = {}

    def sites(self) -> Iterator[Site]:
        """Yield every linear layer that changed; raises UnsupportedAdapter, LimitExceeded, WrongBase."""
        for layer in range(self._options.base.num_hidden_layers):
            for site in SITES:
                change, bias = self._change(layer, site), self._bias(layer, site)
                if change is None and bias is None:
                    continue
                if change is not None:
                    self._kinds[change.kind] = self._kinds.get(change.kind, 0) + 1
                    self._errors.append(change.error)
                yield self._site(layer, site, change, bias)

    def facts(self) -> dict[str, Json]:
        """Return what the manifest records: the forms taken, and the largest error of a low rank."""
        forms = ", ".join(f"{count} {kind}" for kind, count in sorted(self._kinds.items()))
        return {"forms": forms, "max_weight_error": float(f"{max(self._errors, default=0.0):.1e}")}

    def _site(self, layer: int, site: str, change: Change | None, bias: Float32 | None) -> Site:
        module = _module(layer, site, change, has_bias=bias is not None)

        def read(kind: str) -> Values:
            if kind == "bias":
                assert bias is not None, "asked for only where there is one"
                return bias
            own = self._again(layer, site)
            if kind in ("A", "BT"):
                return own.a if kind == "A" and own.a is not None else own.values
            if kind.endswith(".idx"):
                return own.places
            if kind.startswith("csr."):
                return csr_values(ParamDelta(self._options.base.site_shape(site), own.places, own.values), kind)
            return own.values

        def apply(x: Float64) -> tuple[Float64, Float64]:
            trained, original = (site_values(files, layer, site, self._options.base) for files in self._both())
            y = x @ trained.T.astype(np.float64) - x @ original.T.astype(np.float64)
            size = np.abs(x) @ (np.abs(trained) + np.abs(original)).T
            return (y, size) if bias is None else (y + bias, size + np.abs(bias))

        # a low rank misses by what was measured on every value; its proof is the whole model's
        return Site(module, read, None if change is not None and change.rank else apply)

    def _both(self) -> tuple[ModelFiles, ModelFiles]:
        return self._found, self._base

    def _again(self, layer: int, site: str) -> Change:
        if self._kept is None or self._kept[0] != (layer, site):
            change = self._change(layer, site)
            assert change is not None, "the same files give the same change"
        assert self._kept is not None, "kept by the line above"
        return self._kept[1]

    def _change(self, layer: int, site: str) -> Change | None:
        if (layer, site) in self._low_ranks:
            self._kept = (layer, site), self._low_ranks[layer, site]
            return self._low_ranks[layer, site]
        options = self._options
        found, base = (site_values(files, layer, site, options.base) for files in self._both())
        change = classify(found, base, self._dtype(layer, site), options.max_rank, is_lossy=self._is_lossy)
        if isinstance(change, Facts):
            change = self._dense(layer, site, found - base, change)
        if change is not None:
            self._kept = (layer, site), change
            self._keep_low_rank((layer, site), change)
        return change

    def _keep_low_rank(self, place: tuple[int, str], change: Change) -> None:
        num_bytes = 0 if change.a is None else change.a.nbytes + change.values.nbytes
        if 0 < num_bytes <= _MAX_KEPT_BYTES - self._low_rank_bytes:
            self._low_ranks[place] = change
            self._low_rank_bytes += num_bytes

    def _dense(self, layer: int, site: str, delta: Float32, facts: Facts) -> Change:
        if self._options.dense_budget_bytes == 0 or delta.size * 2 > self._options.dense_budget_bytes:
            path = _module(layer, site, None, has_bias=True).path
            raise UnsupportedAdapter(
                f"{path} changed in {facts.density:.0%} of its values and has a numerical rank above "
                f"{self._options.max_rank}: a dense delta, for which this server's budget is "
                f"{self._options.dense_budget_bytes} bytes; extract a LoRA, or send the option lossy if it was merged "
                "from one",
                param=path,
            )
        return Change("dense", np.zeros(0, dtype=np.int64), delta)

    def _dtype(self, layer: int, site: str) -> str:
        return self._found.dtype(f"{site_stem(self._found, layer, site, self._options.base)[0]}.weight")

    def _bias(self, layer: int, site: str) -> Float32 | None:
        own, base = (site_values(files, layer, site, self._options.base, "bias") for files in self._both())
        delta: Float32 = own - base
        return delta if np.any(delta) else None


def _need_base_dir(options: ConvertOptions) -> Path:
    if options.base_dir is None:
        raise WrongBase(
            "a fine-tuned model is compared with the base's weights, which are not at hand: name them with --base"
        )
    return Path(options.base_dir)


def _module(layer: int, site: str, change: Change | None, *, has_bias: bool) -> Module:
    kind = None if change is None else change.kind
    count = 0 if change is None else len(change.places)
    return Module(
        layer,
        SITES.index(site),
        0 if change is None else change.rank,
        has_bias,
        cols=count if kind == "cols" else 0,
        rows=count if kind == "rows" else 0,
        csr=Csr(count, is_ternary=False) if kind == "csr" else None,
        has_dense=kind == "dense",
    )

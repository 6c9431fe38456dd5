"""The canonical file of a planned PEFT adapter: which tensor holds which of its values.

Owns the cutting of fused projections into sites and the rounding. Invariant: each value of a tuner's factors is rounded
to float32 at most once, and then once to its tensor's dtype.
"""

from dataclasses import dataclass

import numpy as np

from adapters_store.base import SITES, BaseDims
from adapters_store.convert.adapter_writer import encode_indices, overflow
from adapters_store.convert.model_factors import ModelFactors
from adapters_store.convert.peft_tensors import TensorFile
from adapters_store.convert.tuner import Array, Delta, Factors, PlannedModule, SparseValues
from adapters_store.float_bits import FILE_DTYPES, Float32, encode, is_finite
from adapters_store.image_check import is_neutral
from adapters_store.manifest import Module
from adapters_store.model_ops import EmbedLowrank, KvPrefix, ModelOps, NormWeight, PromptEmbeds, TokenRows
from adapters_store.ops import HEAD_LAYER, SCALE_DTYPE, Csr

_MODULE_KINDS = (
    *("A", "BT", "csr.indptr", "csr.col", "csr.val", "out_scale", "in_scale", "in_blockdiag"),
    *("rot2.c0", "rot2.c1", "bias"),
)
_IN_IMAGE_DTYPE = frozenset({"A", "BT", "csr.val", "bias"})


@dataclass(frozen=True, slots=True)
class Part:
    """One site's share of a PEFT module: outputs `begin..end`."""

    planned: PlannedModule
    begin: int
    end: int


class PeftImage:
    """The open PEFT file and which part of it each tensor is made of; holds one module's values at a time."""

    def __init__(self, file: TensorFile, parts: dict[Module, Part], model: ModelFactors) -> None:
        self._file = file
        self._model_values = _model_values(model)
        self._norms = {NormWeight(layer, norm).tensor for layer, norm in model.norms}
        self._kinds = {module.tensor(kind): (module, kind) for module in parts for kind in _MODULE_KINDS}
        self.parts = parts
        self.acts = _model_acts(model)
        self._path: str | None = None
        self._factors: Factors | None = None

    def delta(self, module: Module) -> Delta:
        """Read the trained values of the PEFT module that this canonical one is part of."""
        return self.parts[module].planned.load(self._file)

    def encoded(self, name: str, dtype: str) -> bytes:
        """Return one tensor's bytes in an image of `dtype`; raises ValueOverflow."""
        if name in self._model_values:
            value = self._model_values[name]
            return value if isinstance(value, bytes) else _encode(value, name, dtype, is_scale=name in self._norms)
        module, kind = self._kinds[name]
        part = self.parts[module]
        factors = self._factors_of(part.planned)
        if kind in ("csr.indptr", "csr.col"):
            sparse = own_entries(factors, part)
            starts = np.searchsorted(sparse.rows, np.arange(part.end - part.begin + 1))
            return encode_indices(starts.astype(np.int64) if kind == "csr.indptr" else sparse.cols)
        values, path = _values(factors, part, kind), part.planned.source.path
        return _encode(values, path, dtype, is_scale=kind not in _IN_IMAGE_DTYPE, kind=kind)

    def _factors_of(self, planned: PlannedModule) -> Factors:
        if self._path != planned.source.path or self._factors is None:
            self._factors = planned.load(self._file).factors()
            self._path = planned.source.path
            self.acts = self.acts or _acts(self._factors)
        return self._factors


def cut_into_sites(planned: dict[str, PlannedModule], file: TensorFile, base: BaseDims) -> dict[Module, Part]:
    """Return the adapter's modules in image order, each with its share of a PEFT module; without those of no effect."""
    parts: dict[Module, Part] = {}
    for plan in planned.values():
        sparse = plan.load(file).factors() if plan.has_sparse else None
        begin = 0
        for site in plan.source.sites:
            end = begin + base.site_shape(site)[0]
            part = Part(plan, begin, end)
            count = 0 if sparse is None else len(own_entries(sparse, part).rows)
            module = _module(plan, site, count)
            if module.ops():
                parts[module] = part
            begin = end
    return dict(sorted(parts.items()))


def model_ops(model: ModelFactors) -> ModelOps:
    """Return the manifest's ops outside the linear layers."""
    prompt, prefix = model.prompt, model.prefix
    return ModelOps(
        norms=tuple(sorted(NormWeight(layer, norm) for layer, norm in model.norms)),
        token_rows=tuple(sorted(TokenRows(target, len(rows.ids)) for target, rows in model.token_rows.items())),
        embed_lowrank=None if model.embedding is None else EmbedLowrank(model.embedding.factors()[0].shape[1]),
        prompt_embeds=None if prompt is None else PromptEmbeds(len(prompt.factors())),
        kv_prefix=None if prefix is None else KvPrefix(prefix.factors()[0].shape[1]),
    )


def own_entries(factors: Factors, part: Part) -> SparseValues:
    """Return the entries of a sparse delta in a part's rows, rows counted from the part's first."""
    sparse = factors.sparse
    assert sparse is not None, "the plan says that there are entries"
    own = slice(*np.searchsorted(sparse.rows, [part.begin, part.end]))
    return SparseValues(sparse.rows[own] - part.begin, sparse.cols[own], sparse.values[own])


def _module(plan: PlannedModule, site: str, num_entries: int) -> Module:
    is_head = plan.source.layer == HEAD_LAYER
    return Module(
        layer=plan.source.layer,
        site_index=0 if is_head else SITES.index(site),
        rank=plan.rank,
        has_bias=plan.has_bias,
        has_out_scale=plan.has_out_scale,
        has_in_scale=plan.has_in_scale,
        csr=Csr(num_entries, is_ternary=False) if num_entries else None,
        blockdiag=plan.block,
        rot2_group=plan.rotation_group,
    )


def _values(factors: Factors, part: Part, kind: str) -> Array:
    """Return A [rank, in], in_scale [in], blocks [in / b, b, b], or this part of all others."""
    own = slice(part.begin, part.end)
    if kind == "A":
        return factors.a
    if kind == "BT":
        return factors.b[own].T
    if kind == "csr.val":
        return own_entries(factors, part).values
    rotation = factors.rotation
    vectors = {
        "bias": factors.bias,
        "out_scale": factors.out_scale,
        "in_scale": factors.in_scale,
        "in_blockdiag": factors.blocks,
        "rot2.c0": None if rotation is None else rotation.c0,
        "rot2.c1": None if rotation is None else rotation.c1,
    }
    vector = vectors[kind]
    assert vector is not None, "the layout asks for a vector only where the plan has one"
    return vector if kind in ("in_scale", "in_blockdiag") else vector[own]


def _model_values(model: ModelFactors) -> dict[str, Array | bytes]:
    values: dict[str, Array | bytes] = {}
    for (layer, norm), weight in model.norms.items():
        values[NormWeight(layer, norm).tensor] = weight
    for target, rows in model.token_rows.items():
        op = TokenRows(target, len(rows.ids))
        values[op.tensor("idx")] = encode_indices(rows.ids)
        values[op.tensor("E")] = rows.rows
    if model.embedding is not None:
        values["embed.AT"], values["embed.BT"] = model.embedding.factors()
    if model.prompt is not None:
        values["prompt.E"] = model.prompt.factors()
    if model.prefix is not None:
        values["prefix.K"], values["prefix.V"] = model.prefix.factors()
    return values


def _encode(values: Array, what: str, dtype: str, *, is_scale: bool, kind: str = "") -> bytes:
    file_dtype = SCALE_DTYPE if is_scale else FILE_DTYPES[dtype]
    raw = encode(_rounded(values), file_dtype)
    if not is_finite(raw, file_dtype):
        shown = f"{kind} of {what}" if kind else what
        raise overflow(values, "float32" if is_scale else dtype, shown, param=what)
    return raw


def _acts(factors: Factors) -> bool:
    """Return whether a rank has values in both factors, an entry or the bias has any, or a frame moves anything."""
    has_rank = np.any(_rounded(factors.a).any(axis=1) & _rounded(factors.b).any(axis=0))
    has_bias = factors.bias is not None and bool(factors.bias.any())
    has_entries = factors.sparse is not None and bool(factors.sparse.values.any())
    scales = [scale for scale in (factors.out_scale, factors.in_scale) if scale is not None]
    if factors.rotation is not None:
        scales += [factors.rotation.c0, factors.rotation.c1 + 1]
    if factors.blocks is not None:
        scales.append(factors.blocks - np.eye(factors.blocks.shape[1]) + 1)
    return bool(has_rank) or has_bias or has_entries or not all(map(is_neutral, scales))


def _model_acts(model: ModelFactors) -> bool:
    """Return whether there is more outside the linear layers than an embedding's product of zero."""
    if model.norms or model.token_rows or model.prompt is not None or model.prefix is not None:
        return True
    if model.embedding is None:
        return False
    at, bt = model.embedding.factors()
    return bool(np.any(_rounded(at).any(axis=0) & _rounded(bt).any(axis=1)))


def _rounded(values: Array) -> Float32:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(np.float32, copy=False))

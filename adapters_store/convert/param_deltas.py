"""Single changed values of the base's own parameters, wherever they lie, and the ops that they become.

Owns which op serves which parameter: sparse matrices on linear layers, biases, norm weights and token rows, the latter
two from the base's values. Invariant: every change is served at its place or the adapter is refused by the parameter's
name; places are in order and none occurs twice.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import SITES, BaseDims
from adapters_store.convert.foreign import Site, Values
from adapters_store.convert.lora_mixtures import split_sites, whole_shape
from adapters_store.convert.model_files import ModelFiles, open_model
from adapters_store.convert.options import ConvertOptions
from adapters_store.convert.site_effect import Float64
from adapters_store.convert.tensor_files import Int64
from adapters_store.errors import InvalidIndex, LimitExceeded, UnsupportedAdapter, WrongBase
from adapters_store.float_bits import Float32
from adapters_store.model_ops import FINAL_NORM, NORMS, ModelOps, NormWeight, TokenRows
from adapters_store.op_limits import MAX_SELECTED_SHARE
from adapters_store.ops import Csr, Module
from adapters_store.safetensors_header import CANONICAL_LIMITS

_PREFIXES = ("base_model.model.model.", "base_model.model.", "model.language_model.", "language_model.model.", "model.")
_LAYER = re.compile(r"layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<path>[a-z_.]+)\.(?P<kind>weight|bias)\Z")
_TABLES = {"embed_tokens.weight": "embed", "lm_head.weight": "lm_head"}


@dataclass(frozen=True, slots=True)
class ParamDelta:
    """What is added to one parameter: row-major places [n], increasing, and values [n], none of them 0.

    `scale` is set where every value is plus or minus this one number.
    """

    shape: tuple[int, ...]
    places: Int64
    values: Float32
    scale: float | None = None

    @classmethod
    def of(
        cls, name: str, shape: tuple[int, ...], places: Int64, values: Float32, scale: float | None = None
    ) -> "ParamDelta":
        """Order the places and drop zeros; raises InvalidIndex for one out of range or twice."""
        if len(places) != len(values) or places.ndim != 1 or values.ndim != 1:
            raise InvalidIndex(f"{name} names {places.shape} places for {values.shape} values", param=name)
        size = int(np.prod(shape, dtype=np.int64))
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < size):
            raise InvalidIndex(f"{name} names a place outside its {size} values", param=name)
        order = np.argsort(places, kind="stable")
        places, values = places[order], values[order]
        if np.any(places[1:] == places[:-1]):
            raise InvalidIndex(f"{name} names a place twice", param=name)
        kept = values != 0
        return cls(shape, places[kept], values[kept], scale)

    def rows(self, begin: int, end: int) -> "ParamDelta":
        """Return the part of a matrix that changes the rows `begin..end`."""
        width = self.shape[1]
        first, last = np.searchsorted(self.places, (begin * width, end * width))
        own = slice(int(first), int(last))
        return ParamDelta((end - begin, width), self.places[own] - begin * width, self.values[own], self.scale)


Deltas = dict[str, ParamDelta]


@dataclass(frozen=True, slots=True)
class ServedDeltas:
    """The ops that deltas became; `used_base`: values of the base's are in them."""

    sites: tuple[Site, ...]
    model_ops: ModelOps
    model_values: dict[str, Callable[[], Values]]
    used_base: bool


def neutral_name(name: str) -> str:
    """Return a parameter's name without the model's prefix."""
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def serve(deltas: Deltas, options: ConvertOptions) -> ServedDeltas:
    """Return the ops that act as the deltas do; `deltas` by neutral name.

    Raises:
        UnsupportedAdapter: a parameter that no op serves. WrongBase: the base is needed and not at hand.
        LimitExceeded: too many rows of the vocabulary.
    """
    sites = _sites({name: delta for name, delta in deltas.items() if len(delta.places)}, options.base)
    outer = {name: delta for name, delta in deltas.items() if len(delta.places) and not _is_linear(name, options.base)}
    values: dict[str, Callable[[], Values]] = {}
    norms: list[NormWeight] = []
    rows: list[TokenRows] = []
    with _open_base(options, needed=bool(outer)) as base:
        for name, delta in sorted(outer.items()):
            assert base is not None, "the base was opened where it is needed"
            _check_shape(name, delta, base)
            if name in _TABLES:
                rows.append(_token_rows(name, delta, base, options.base, values))
            else:
                norm = _norm(name)
                whole = base.values(name).reshape(-1)
                whole[delta.places] += delta.values
                norms.append(norm)
                values[norm.tensor] = partial(_constant, whole)
    model_ops = ModelOps(norms=tuple(sorted(norms)), token_rows=tuple(sorted(rows)))
    return ServedDeltas(sites, model_ops, values, used_base=bool(outer))


def _is_linear(name: str, base: BaseDims) -> bool:
    match = _LAYER.match(name)
    return match is not None and bool(split_sites(match["path"].rpartition(".")[2], base))


def _sites(deltas: Deltas, base: BaseDims) -> tuple[Site, ...]:
    """Return the linear layers that change: their weights and biases together."""
    found: dict[tuple[int, str], dict[str, ParamDelta]] = {}
    for name, delta in deltas.items():
        match = _LAYER.match(name)
        if match is None or not _is_linear(name, base):
            continue
        layer, parts = int(match["layer"]), split_sites(match["path"].rpartition(".")[2], base)
        shape = whole_shape(parts, base)
        if layer >= base.num_hidden_layers or delta.shape != (shape if match["kind"] == "weight" else shape[:1]):
            raise UnsupportedAdapter(f"{name} has shape {list(delta.shape)}; this base has no such one", param=name)
        as_matrix = delta if match["kind"] == "weight" else ParamDelta((shape[0], 1), delta.places, delta.values)
        for site, rows in parts:
            own = as_matrix.rows(rows.start, rows.stop)
            if len(own.places):
                found.setdefault((layer, site), {})[match["kind"]] = own
    return tuple(_site(layer, site, parts, base) for (layer, site), parts in found.items())


def _site(layer: int, site: str, parts: dict[str, ParamDelta], base: BaseDims) -> Site:
    num_out, num_in = base.site_shape(site)
    weight, bias = parts.get("weight"), parts.get("bias")
    dense_bias = np.zeros(num_out, dtype=np.float32)
    if bias is not None:
        dense_bias[bias.places] = bias.values
    csr = None if weight is None else Csr(len(weight.places), weight.scale is not None)
    module = Module(layer, SITES.index(site), 0, has_bias=bias is not None, csr=csr)

    def read(kind: str) -> Values:
        if kind == "bias":
            return dense_bias
        assert weight is not None, "only a sparse matrix has these tensors"
        return csr_values(weight, kind)

    def apply(x: Float64) -> tuple[Float64, Float64]:
        y, size = np.zeros((num_out, len(x))), np.zeros((num_out, len(x)))
        if weight is not None:
            rows, columns = np.divmod(weight.places, num_in)
            np.add.at(y, rows, weight.values.astype(np.float64)[:, None] * x.T[columns])
            np.add.at(size, rows, np.abs(weight.values).astype(np.float64)[:, None] * np.abs(x.T[columns]))
        return y.T + dense_bias, size.T + np.abs(dense_bias)

    return Site(module, read, apply)


def csr_values(delta: ParamDelta, kind: str) -> Values:
    """Return one tensor of a sparse matrix: csr.indptr, csr.col, csr.val, or csr.sign and csr.scale."""
    num_out, num_in = delta.shape
    if kind == "csr.indptr":
        counts = np.bincount(delta.places // num_in, minlength=num_out)
        return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    if kind == "csr.col":
        return np.asarray(delta.places % num_in)
    if kind == "csr.sign":
        return np.asarray(delta.values < 0)
    return np.array([delta.scale], dtype=np.float32) if kind == "csr.scale" else delta.values


def _norm(name: str) -> NormWeight:
    match = _LAYER.match(name)
    if name == f"{FINAL_NORM}.weight":
        return NormWeight(-1, FINAL_NORM)
    norm = "" if match is None or match["kind"] != "weight" else match["path"].removeprefix("self_attn.")
    if match is None or norm not in NORMS:
        raise UnsupportedAdapter(
            f"{name} is changed, which nothing here serves: train linear layers, norms and vocabulary rows", param=name
        )
    return NormWeight(int(match["layer"]), norm)


def _token_rows(
    name: str,
    delta: ParamDelta,
    base: ModelFiles,
    dims: BaseDims,
    values: dict[str, Callable[[], Values]],
) -> TokenRows:
    """Return the vocabulary rows that change, whole, and keep their values."""
    numbers = np.unique(delta.places // delta.shape[1])
    most = int(dims.vocab_size * MAX_SELECTED_SHARE)
    if len(numbers) > most:
        raise LimitExceeded(
            f"{name} changes {len(numbers)} rows of the vocabulary; the limit is {most} (a quarter)", param=name
        )
    table = np.stack([base.rows(name, int(number), int(number) + 1)[0] for number in numbers])
    place = np.searchsorted(numbers, delta.places // delta.shape[1])
    table[place, delta.places % delta.shape[1]] += delta.values
    is_tied = dims.tie_word_embeddings and name == "embed_tokens.weight"
    rows = TokenRows("both" if is_tied else _TABLES[name], len(numbers))
    values[rows.tensor("idx")] = partial(_constant, numbers)
    values[rows.tensor("E")] = partial(_constant, table)
    return rows


def _constant(values: npt.NDArray[np.float32] | Int64) -> Values:
    return values


def _check_shape(name: str, delta: ParamDelta, base: ModelFiles) -> None:
    if name not in base.names or base.shape(name) != delta.shape:
        raise UnsupportedAdapter(f"{name} has shape {list(delta.shape)}; this base has no such one", param=name)


def _open_base(options: ConvertOptions, *, needed: bool) -> AbstractContextManager[ModelFiles | None]:
    if not needed:
        return nullcontext()
    if options.base_dir is None:
        raise WrongBase(
            "the adapter changes norms or vocabulary rows, which are stored whole, with the base's values; these are "
            "not at hand: name them with --base"
        )
    is_tied = options.base.tie_word_embeddings
    return open_model(Path(options.base_dir), CANONICAL_LIMITS, is_trusted=True, is_tied=is_tied)

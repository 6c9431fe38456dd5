"""Proof of a conversion: read the canonical file back and compare what it does with the source's own formula.

Owns the comparison only: `y = (x A^T) BT + x sparse^T + bias` of the canonical file and `Delta.apply` of the source on
random rows, in float64, for a few modules; their scales with the source's, value by value; and what their rotations
make of random rows. Invariant: a canonical file whose modules act differently from their source beyond the rounding of
its dtype is never published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters_store.base import BaseDims
from adapters_store.convert.tuner import Delta, Float64, ScaledDelta, TurningDelta
from adapters_store.errors import ConversionFailed
from adapters_store.float_bits import ROUNDOFF, decode
from adapters_store.manifest import Module
from adapters_store.ops import INDEX_DTYPE
from adapters_store.safetensors_header import CANONICAL_LIMITS, TensorSlot, read_header

_NUM_ROWS = 4
_SEED = 20260901
# three roundings meet in a product of A and B; float32 keeps the promise of 1e-5 with room
_SLACK = 3.0
# the smallest subnormal: what a value may lose to underflow
UNDERFLOW = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}
# of the float64 sums themselves, relative to their terms
_NOISE = 1e-12
# scales are float32: one rounding, and the noise of a length whose terms nearly cancel
_SCALE_ERROR, _SCALE_STEP = 2.0**-23, 2.0**-148
# rotations come from solvers in float64, by two ways
_TURN_NOISE = 1e-10


@dataclass(frozen=True, slots=True)
class SourceModule:
    """One canonical module, which is outputs `begin..end` of a module of the source, and a reader of that one."""

    module: Module
    begin: int
    end: int
    delta: Callable[[], Delta]


@dataclass(frozen=True, slots=True)
class _Canonical:
    """The stored values of one module: a [rank, in], bt [rank, out], sparse [out, in], bias [out].

    out_scale [out], in_scale [in]; blocks [in / b, b, b]; c0 and c1 [out] turn outputs in groups of `group`.
    """

    a: Float64
    bt: Float64
    sparse: Float64 | None
    bias: Float64
    out_scale: Float64 | None
    in_scale: Float64 | None
    blocks: Float64 | None
    c0: Float64 | None
    c1: Float64 | None
    group: int


def measure_error(
    path: Path, slots: tuple[TensorSlot, ...], sources: list[SourceModule], dtype: str, base: BaseDims
) -> float:
    """Return the largest difference of any output over the first, middle and last module, to two digits.

    Raises:
        ConversionFailed: it is larger than the dtype's rounding explains.
    """
    chosen = {0, len(sources) // 2, len(sources) - 1}
    random = np.random.default_rng(_SEED)
    by_name = {slot.name: slot for slot in slots}
    errors = []
    for index in sorted(chosen):
        source = sources[index]
        x = random.standard_normal((_NUM_ROWS, base.site_shape(source.module.site)[1]))
        errors.append(_module_error(_read_module(path, by_name, source, x.shape[1]), source, dtype, x))
    return max(errors)


def _module_error(stored: _Canonical, source: SourceModule, dtype: str, x: Float64) -> float:
    delta = source.delta()
    _check_scales(stored, source, delta)
    whole = delta.apply(x)
    _check_turns(stored, source, delta, x, num_out=whole.shape[1])
    wanted = whole[:, source.begin : source.end]
    found = (x @ stored.a.T) @ stored.bt + stored.bias
    a, bt, bias, size = np.abs(stored.a), np.abs(stored.bt), np.abs(stored.bias), np.abs(x)
    tiny = UNDERFLOW[dtype]
    exact = (size @ a.T) @ bt + bias
    widened = (size @ (a + tiny).T) @ (bt + tiny) + bias + tiny
    if stored.sparse is not None:
        found = found + x @ stored.sparse.T
        places = np.abs(stored.sparse)
        exact = exact + size @ places.T
        widened = widened + size @ (places + tiny).T
    noise = _NOISE * (widened + _sum_of_terms(delta, source, size))
    error = np.abs(wanted - found)
    if not np.all(error <= _SLACK * ROUNDOFF[dtype] * widened + (widened - exact) + noise):
        raise _failed(source)
    # noise of the sums would make the manifest depend on the machine
    largest = float(np.max(error))
    return float(f"{largest:.1e}") if largest > float(np.max(noise)) else 0.0


def _check_scales(stored: _Canonical, source: SourceModule, delta: Delta) -> None:
    """Compare the scales themselves: what they act on is the base's own product. Raises ConversionFailed."""
    out_scale, in_scale = delta.scales() if isinstance(delta, ScaledDelta) else (None, None)
    own = None if out_scale is None else out_scale[source.begin : source.end]
    for found, wanted in ((stored.out_scale, own), (stored.in_scale, in_scale)):
        if found is None and wanted is None:
            continue
        if found is None or wanted is None or not np.allclose(found, wanted, rtol=_SCALE_ERROR, atol=_SCALE_STEP):
            raise _failed(source)


def _check_turns(stored: _Canonical, source: SourceModule, delta: Delta, x: Float64, *, num_out: int) -> None:
    """Compare what the rotations make of random rows: they act on the base's own product. Raises ConversionFailed.

    num_out: of the source's whole module, of which this one may be a part.
    """
    is_turned = stored.blocks is not None or stored.c0 is not None
    if not isinstance(delta, TurningDelta):
        if is_turned:
            raise _failed(source)
        return
    turned, size = x, np.abs(x)
    if stored.blocks is not None:
        pieces = x.reshape(len(x), *stored.blocks.shape[:2])
        turned = np.einsum("tnb,nbc->tnc", pieces, stored.blocks).reshape(x.shape)
        size = np.einsum("tnb,nbc->tnc", np.abs(pieces), np.abs(stored.blocks)).reshape(x.shape)
    _check_close(turned, delta.turned_inputs(x), size, source)
    u = np.random.default_rng(_SEED + 1).standard_normal((len(x), num_out))
    wanted, own = delta.turned_outputs(u)[:, source.begin : source.end], u[:, source.begin : source.end]
    direct, crossed = own, np.zeros_like(own)
    if stored.c0 is not None and stored.c1 is not None:
        first, second = np.split(own.reshape(len(own), -1, stored.group), 2, axis=2)
        direct = stored.c0 * own
        crossed = stored.c1 * np.concatenate([-second, first], axis=2).reshape(own.shape)
    _check_close(direct + crossed, wanted, np.abs(direct) + np.abs(crossed), source)


def _check_close(found: Float64, wanted: Float64, size: Float64, source: SourceModule) -> None:
    if not np.all(np.abs(found - wanted) <= (_SCALE_ERROR + _TURN_NOISE) * size + _TURN_NOISE):
        raise _failed(source)


def _failed(source: SourceModule) -> ConversionFailed:
    return ConversionFailed(
        f"the conversion of {source.module.path} does not act as its source; this is a bug of the server"
    )


def _sum_of_terms(delta: Delta, source: SourceModule, size: Float64) -> Float64:
    """Bound the terms that were added up into the values of A and B themselves; 0 where they are no sums."""
    factors = delta.factors()
    if factors.a_terms is None and factors.b_terms is None:
        return np.zeros((len(size), source.end - source.begin))
    a = np.abs(factors.a) if factors.a_terms is None else factors.a_terms
    b = np.abs(factors.b) if factors.b_terms is None else factors.b_terms
    terms: Float64 = (size @ a.T.astype(np.float64)) @ b[source.begin : source.end].T.astype(np.float64)
    return terms


def _read_module(path: Path, slots: dict[str, TensorSlot], source: SourceModule, num_in: int) -> _Canonical:
    module, num_out = source.module, source.end - source.begin
    has_rank = module.rank > 0

    def optional(kind: str, *, is_there: bool) -> Float64 | None:
        return read_stored(path, slots[module.tensor(kind)]) if is_there else None

    sparse = None
    if module.csr is not None:
        begins, cols, values = (
            read_stored(path, slots[module.tensor(f"csr.{kind}")]) for kind in ("indptr", "col", "val")
        )
        sparse = np.zeros((num_out, num_in))
        counts: npt.NDArray[np.int64] = (begins[1:] - begins[:-1]).astype(np.int64)
        rows = np.repeat(np.arange(num_out), counts)
        sparse[rows, cols.astype(np.int64)] = values
    return _Canonical(
        a=read_stored(path, slots[module.tensor("A")]) if has_rank else np.zeros((0, num_in)),
        bt=read_stored(path, slots[module.tensor("BT")]) if has_rank else np.zeros((0, num_out)),
        sparse=sparse,
        bias=read_stored(path, slots[module.tensor("bias")]) if module.has_bias else np.zeros(num_out),
        out_scale=optional("out_scale", is_there=module.has_out_scale),
        in_scale=optional("in_scale", is_there=module.has_in_scale),
        blocks=optional("in_blockdiag", is_there=module.blockdiag > 0),
        c0=optional("rot2.c0", is_there=module.rot2_group > 0),
        c1=optional("rot2.c1", is_there=module.rot2_group > 0),
        group=module.rot2_group,
    )


def read_stored(path: Path, slot: TensorSlot) -> Float64:
    """Read one tensor of the canonical file back."""
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, CANONICAL_LIMITS, what=path.name)
        file.seek(header.data_start + slot.begin)
        raw = file.read(slot.end - slot.begin)
    if slot.dtype == INDEX_DTYPE:
        return np.frombuffer(raw, "<i4").reshape(slot.shape).astype(np.float64)
    return decode(raw, slot.dtype).reshape(slot.shape).astype(np.float64)

"""The tensors of a PEFT file, grouped by the module they act on, and their values.

Owns the names that PEFT gives tensors, and the reading of one tensor at a time; knows no tuner. Invariant: every
tensor of the file belongs to exactly one module or to the whole model, or the file is refused.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapters_store.base import HEAD, SITE_PATHS, BaseDims
from adapters_store.convert.base_weights import FUSED_SITES, BaseWeights
from adapters_store.convert.outer_tensors import OuterTensors, outer_name
from adapters_store.errors import CorruptUpload, NonFiniteValues, UnsupportedAdapter
from adapters_store.float_bits import Float32, decode, is_finite
from adapters_store.ops import HEAD_LAYER
from adapters_store.safetensors_header import Header, TensorSlot

MODEL_NAME = "adapter_model.safetensors"

SITES_OF = {path: (site,) for site, path in SITE_PATHS.items()} | FUSED_SITES | {HEAD: (HEAD,)}

_MODULE_TENSOR = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<path>(?P<prefix>|model\.|language_model\.|language_model\.model\.|model\.language_model\.)"
    r"layers\.(?P<layer>0|[1-9][0-9]{0,4})\.(?P<module>[a-z_]+\.[a-z_]+))\.(?P<part>[A-Za-z0-9_.]+)\Z"
)
_HEAD_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?lm_head\.(?P<part>[A-Za-z0-9_.]+)\Z"
)
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,6})\Z")
_FLOATS = frozenset({"F32", "F16", "BF16"})
_INTEGERS = {"U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
# PEFT's own name for an adapter; it removes the name when it saves, other writers do not
_ADAPTER_NAME = "default"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """What a tuner's file may hold: names per module, names of the whole model, and those of both with indices.

    A shared name may be followed by a number in the file: `tinylora_v` stands for `tinylora_v.0`, `tinylora_v.1`, ...
    """

    tuner: str
    parts: frozenset[str]
    shared: frozenset[str]
    integers: frozenset[str]


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One module of the trained model: `path` as PEFT knew it, `module` without the layer, and its tensors by name."""

    path: str
    layer: int
    module: str
    parts: dict[str, TensorSlot]

    @property
    def sites(self) -> tuple[str, ...]:
        """The base's sites whose rows this module stacks."""
        return SITES_OF[self.module]

    def dims(self, base: BaseDims) -> tuple[int, int]:
        """Return (out, in) of the module's linear layer."""
        shapes = [base.site_shape(site) for site in self.sites]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def take(self, *names: str) -> tuple[TensorSlot, ...]:
        """Return these tensors, which must be all that the module has.

        Raises:
            CorruptUpload: one is missing. UnsupportedAdapter: there is another one.
        """
        lacking = [name for name in names if name not in self.parts]
        if lacking:
            raise CorruptUpload(f"the file has no {lacking[0]} for {self.path}", param=self.path)
        extra = [slot.name for name, slot in self.parts.items() if name not in names]
        if extra:
            raise UnsupportedAdapter(
                f"the file holds {extra[0]}, which has no meaning with this config", param=extra[0]
            )
        return tuple(self.parts[name] for name in names)


@dataclass(frozen=True, slots=True)
class PeftTensors:
    """All modules of a file by path, the prefix of these paths (`model.` as a rule), and tensors of the whole model.

    `outer` are those outside the linear layers' adapters; `weights` the served base's, for formulas that need them.
    """

    modules: dict[str, PeftModule]
    prefix: str
    shared: dict[str, TensorSlot]
    outer: OuterTensors
    weights: BaseWeights

    def take_shared(self, *names: str, way_out: str = "") -> tuple[TensorSlot, ...]:
        """Return these tensors of the whole model, which must be all that there are.

        Raises:
            CorruptUpload: one is missing; `way_out` ends the message. UnsupportedAdapter: there is another one.
        """
        lacking = [name for name in names if name not in self.shared]
        if lacking:
            raise CorruptUpload(f"the file has no base_model.{lacking[0]}{way_out}", param=lacking[0])
        extra = [slot.name for name, slot in self.shared.items() if name not in names]
        if extra:
            raise UnsupportedAdapter(
                f"the file holds {extra[0]}, which has no meaning with this config", param=extra[0]
            )
        return tuple(self.shared[name] for name in names)


class TensorFile:
    """Reads values out of an open file; the caller keeps the file open and closes it."""

    def __init__(self, file: BinaryIO, data_start: int) -> None:
        self._file = file
        self._data_start = data_start
        self._kept: dict[str, Float32] = {}

    def floats(self, slot: TensorSlot) -> Float32:
        """Read one tensor as float32; raises NonFiniteValues if it holds NaN or infinity."""
        raw = self._read(slot)
        if not is_finite(raw, slot.dtype):
            raise NonFiniteValues(f"tensor {slot.name} holds NaN or infinity", param=slot.name)
        return decode(raw, slot.dtype).reshape(slot.shape)

    def rows(self, slot: TensorSlot, begin: int, end: int) -> Float32:
        """Read rows `begin..end` of one tensor as float32; raises NonFiniteValues as `floats`."""
        row_bytes = (slot.end - slot.begin) // slot.shape[0]
        first = slot.begin + begin * row_bytes
        part = TensorSlot(
            slot.name, slot.dtype, (end - begin, *slot.shape[1:]), first, first + (end - begin) * row_bytes
        )
        return self.floats(part)

    def shared(self, slot: TensorSlot) -> Float32:
        """Read a tensor that every module needs; it is kept, so only for the few of the whole model."""
        if slot.name not in self._kept:
            self._kept[slot.name] = self.floats(slot)
        return self._kept[slot.name]

    def indices(self, slot: TensorSlot, limit: int) -> npt.NDArray[np.int64]:
        """Read positions below `limit`; raises UnsupportedAdapter if one is not."""
        values = np.frombuffer(self._read(slot), _INTEGERS[slot.dtype]).astype(np.int64).reshape(slot.shape)
        check_positions(values, limit, slot)
        return values

    def _read(self, slot: TensorSlot) -> bytes:
        self._file.seek(self._data_start + slot.begin)
        return self._file.read(slot.end - slot.begin)


def check_positions(values: npt.NDArray[np.int64], limit: int, slot: TensorSlot) -> None:
    """Raise UnsupportedAdapter, with the tensor as `param`, unless all positions lie in `0..limit`."""
    if np.any((values < 0) | (values >= limit)):
        raise UnsupportedAdapter(f"{slot.name} holds positions outside 0 to {limit - 1}", param=slot.name)


def group_tensors(header: Header, names: TensorNames, weights: BaseWeights) -> PeftTensors:
    """Sort the file's tensors into modules.

    Raises:
        UnsupportedAdapter: a tensor that this kind of adapter does not have. CorruptUpload: one repeats.
    """
    modules: dict[str, PeftModule] = {}
    shared: dict[str, TensorSlot] = {}
    outer = OuterTensors()
    prefixes: set[str] = set()
    for slot in header.tensors:
        place = outer_name(slot.name)
        match, head = _MODULE_TENSOR.match(slot.name), _HEAD_TENSOR.match(slot.name)
        if place is not None and not _is_part(match, names):
            _check_dtype(slot, _FLOATS)
            outer.add(place, slot)
            continue
        if match is not None and match["module"] in SITES_OF:
            name = _without_adapter_name(match["part"])
            module = PeftModule(match["path"], int(match["layer"]), match["module"], {})
            found = modules.setdefault(match["path"], module).parts
            prefixes.add(match["prefix"])
            is_known = name in names.parts
        elif head is not None:
            name = _without_adapter_name(head["part"])
            found = modules.setdefault(HEAD, PeftModule(HEAD, HEAD_LAYER, HEAD, {})).parts
            is_known = name in names.parts
        else:
            name = _without_adapter_name(slot.name.removeprefix("base_model."))
            found = shared
            is_known = name in names.shared or _is_numbered(name, names.shared)
        _check(slot, name, names, is_known=is_known)
        if name in found:
            raise CorruptUpload(f"the file holds {name!a} twice for one module", param=slot.name)
        found[name] = slot
    if len(prefixes) > 1:
        raise UnsupportedAdapter("the tensors name modules of more than one model", param=MODEL_NAME)
    return PeftTensors(
        modules=modules, prefix=(prefixes or {"model."}).pop(), shared=shared, outer=outer, weights=weights
    )


def check_shape(slot: TensorSlot, shape: tuple[int, ...]) -> None:
    """Raise UnsupportedAdapter, with the tensor as `param`, unless it has this shape."""
    if slot.shape != shape:
        raise UnsupportedAdapter(
            f"{slot.name} has shape {list(slot.shape)}; the config and this base need {list(shape)}. "
            "Was the adapter trained for another base?",
            param=slot.name,
        )


def _check(slot: TensorSlot, name: str, names: TensorNames, *, is_known: bool) -> None:
    if not is_known:
        raise UnsupportedAdapter(
            f"{slot.name} is not a tensor of {names.tuner} on a linear layer that is served: "
            "q, k, v, o, gate, up and down projections of decoder layers",
            param=slot.name,
        )
    _check_dtype(slot, _INTEGERS.keys() if name in names.integers else _FLOATS)


def _is_part(match: re.Match[str] | None, names: TensorNames) -> bool:
    """Return whether the tensor is one of the tuner's own, `lora_B.bias` and the like, on a linear layer."""
    return match is not None and match["module"] in SITES_OF and _without_adapter_name(match["part"]) in names.parts


def _check_dtype(slot: TensorSlot, wanted: Collection[str]) -> None:
    if slot.dtype not in wanted:
        raise UnsupportedAdapter(
            f"{slot.name} has dtype {slot.dtype}; read here: {', '.join(sorted(wanted))}", param=slot.name
        )


def _without_adapter_name(name: str) -> str:
    head, *rest = name.split(".")
    if _ADAPTER_NAME in rest:
        rest.remove(_ADAPTER_NAME)
    return ".".join([head, *rest])


def _is_numbered(name: str, shared: frozenset[str]) -> bool:
    stem, _, number = name.rpartition(".")
    return stem in shared and _NUMBER.match(number) is not None
